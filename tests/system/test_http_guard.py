"""The guard of a server: who may reach it, and what it does to answers and uploads. No server is started.

test_exposure.py in tests/ui asks a real window the same from outside.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from onecard.system import http_guard
from onecard.system.http_guard import POLICY, UPLOAD, Guard
from tests.support.coroutines import run_apart

HERE = "127.0.0.1:7860"
EMPTY = ({"type": "http.request", "body": b"", "more_body": False},)  # the body of a request without one


def visit(
    path: str = "/config",
    *headers: tuple[str, str],
    kind: str = "http",
    local: bool = True,
    login: bool = False,
    origin: str = "",
    messages: Any = EMPTY,
) -> tuple[int, dict[bytes, bytes], list[Any]]:
    """Status and headers of the answer to one request, and the messages that the application received."""
    waiting, received, sent = iter(messages), [], []

    async def receive() -> Any:
        return next(waiting)

    async def send(message: Any) -> None:
        sent.append(message)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        while not received or received[-1].get("more_body"):
            received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"kept")]})
        await send({"type": "http.response.body", "body": b"fine"})

    names = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    tokens = SimpleNamespace(tokens={"right": "me"})
    scope = {"type": kind, "path": path, "headers": names, "app": tokens}
    run_apart(Guard(application, local, login, origin)(scope, receive, send))
    assert sent[1]["type"] == "http.response.body"
    assert sent[1]["body"] == b"fine" or (sent[1]["body"] and not received)
    return sent[0]["status"], dict(sent[0]["headers"]), received


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (HERE, 200),
        ("127.0.0.1", 200),
        ("127.9.9.9:80", 200),
        ("localhost:7860", 200),
        ("localhost", 200),
        ("[::1]:7860", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("evil.example:7860", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:7860", 403),
        ("192.168.1.4:7860", 403),
        ("[2001:db8::1]:7860", 403),
        ("", 403),
    ],
)
def test_a_local_server_answers_to_its_own_names_only(host, status):
    """So another site's name that suddenly points to this machine does not reach it (DNS rebinding)."""
    assert visit("/config", ("Host", host))[0] == status
    assert visit("/config", ("host", host), local=False)[0] == 200


def test_a_request_without_a_host_is_refused():
    assert visit("/config")[0] == 403


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_only_pages_of_the_server_itself_may_ask(local, kind):
    def status(origin: str) -> int:
        return visit("/config", ("host", HERE), ("Origin", origin), local=local, kind=kind)[0]

    assert status(f"http://{HERE}") == status(f"https://{HERE}") == 200
    for origin in ("http://evil.example", "null", "file://", "http://127.0.0.1:1", f"http://{HERE}.evil", ""):
        assert status(origin) == 403, origin


def test_an_allowed_proxy_is_one_address():
    """Requests through it carry its name as Host, and its address as Origin if they carry one."""
    proxy = "https://x-7860.notebook.example"
    name = ("host", "x-7860.notebook.example")
    assert visit("/config", name, origin=proxy)[0] == 200
    assert visit("/config", ("host", HERE), ("origin", proxy), origin=proxy)[0] == 200
    assert visit("/config", name, ("origin", "https://evil.example"), origin=proxy)[0] == 403
    assert visit("/config", ("host", "y-7860.notebook.example"), origin=proxy)[0] == 403
    assert visit("/config", name)[0] == 403  # where none was allowed
    assert visit("/config", ("host", HERE), origin=proxy)[0] == 200  # the machine itself still may


def test_what_no_window_needs_is_closed_to_everyone():
    host = ("host", HERE)
    for start in ("", "/gradio_api", "/", "/gradio_api/"):
        for path in ("/file=/etc/passwd", "/file/x", "/proxy=http://a", "/proxy/x", "/openapi.json"):
            status, _, received = visit(start + path, host)
            assert (status, received) == (403, []), start + path
    for path in ("/files", "/x/file=a", "/gradio_api/queue/join", "/"):
        assert visit(path, host)[0] == 200, path


@pytest.mark.parametrize(
    ("cookies", "status"),
    [
        (None, 401),
        ("", 401),
        ("access-token-abc=wrong", 401),
        ("other=right", 401),
        ("access-token-abc=", 401),
        ("access-token-abc=right", 200),
        ("access-token=right", 200),
        ("theme=dark; access-token-unsecure-abc=wrong; access-token-abc=right; x=\xe9", 200),
    ],
)
def test_a_password_closes_the_interface(cookies, status):
    headers = [("host", HERE), *([("cookie", cookies)] if cookies is not None else [])]
    for path in ("/gradio_api/queue/data", "/gradio_api/upload", "/gradio_api/startup-events/x"):
        assert visit(path, *headers, login=True)[0] == status, path
        assert visit(path, *headers)[0] == 200, path
    for path in ("/", "/login", "/gradio_api/startup-events", "/gradio_apiary"):
        assert visit(path, *headers, login=True)[0] == 200, path


def test_a_password_does_not_let_other_sites_in():
    headers = ("host", "evil.example"), ("cookie", "access-token-abc=right")
    assert visit("/gradio_api/queue/data", *headers, login=True)[0] == 403


def test_every_answer_carries_the_policy():
    _, headers, _ = visit("/config", ("host", HERE))
    assert headers == {b"x-own": b"kept", b"content-security-policy": POLICY.encode()}


def test_messages_that_are_no_requests_pass():
    """For example the server's own start, which has neither host nor path."""
    passed = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        passed.append((scope, receive, send))

    run_apart(Guard(application, True, True, "")({"type": "lifespan"}, "receive", "send"))
    assert passed == [({"type": "lifespan"}, "receive", "send")]


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/upload/"])
def test_an_abandoned_upload_ends_as_one_that_is_too_large(path):
    """gradio deletes the file of an upload that is too large, but not that of one that just ends."""
    part = {"type": "http.request", "body": b"half a file", "more_body": True}
    gone = {"type": "http.disconnect"}
    _, _, received = visit(path, ("host", HERE), messages=(part, gone))
    assert received[0] == part
    assert len(received[1].pop("body")) > UPLOAD
    assert received[1:] == [{"type": "http.request", "more_body": False}]
    _, _, received = visit("/gradio_api/queue/join", ("host", HERE), messages=(part, gone))
    assert received == [part, gone]


def test_a_refusal_waits_for_the_body_but_not_for_ever():
    """A connection that is closed while its body is being sent is reset, and the answer is lost."""
    part = {"type": "http.request", "body": b"x", "more_body": True}
    last = {"type": "http.request", "body": b"x", "more_body": False}
    for count in (0, 1, 60):
        messages = iter([*[part] * count, last, "the next request"])
        assert visit("/config", ("host", "evil.example"), messages=messages)[0] == 403
        assert list(messages) == ["the next request"]
    endless = iter([part] * 500)
    assert visit("/config", ("host", "evil.example"), messages=endless)[0] == 403
    assert 0 < len(list(endless)) < 500


def test_a_file_may_have_20_mib():
    """What an abandoned upload becomes is larger than that by a byte."""
    gone = ({"type": "http.disconnect"},)
    _, _, received = visit("/gradio_api/upload", ("host", HERE), messages=gone)
    assert len(received[0]["body"]) == 20 * 2**20 + 1


@pytest.mark.parametrize("name", ["127.0.0.1", "127.255.0.3", "::1", "localhost"])
def test_names_of_this_machine(name):
    assert http_guard.is_local(name)


@pytest.mark.parametrize("name", ["", "0.0.0.0", "::", "192.168.0.1", "localhost.example", "my-machine"])
def test_names_of_other_machines(name):
    assert not http_guard.is_local(name)


@pytest.mark.parametrize(("piece", "edge"), [(1_000_000, "edge"), (64, "edge"), (7, "edge"), (1, "----")])
@pytest.mark.parametrize("count", [1, 16, 17, 40])
def test_an_upload_of_more_than_16_files_ends_as_one_that_is_too_large(count, piece, edge):
    """Whatever pieces it comes in, and whatever stands between the files; one of 16 files passes as it is."""
    border = f"--{edge}".encode()
    parts = [b"%s\r\nname=f%d\r\n\r\ntext\r\n" % (border, number) for number in range(count)]
    body = b"".join(parts) + border + b"--\r\n"
    pieces = [body[start : start + piece] for start in range(0, len(body), piece)]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(pieces) - 1}
        for number, part in enumerate(pieces)
    ]
    headers = ("host", HERE), ("content-type", f"multipart/form-data; boundary={edge}")
    _, _, received = visit("/gradio_api/upload", *headers, messages=messages)
    if count <= 16:
        assert received == messages
    else:
        last = received[-1].pop("body")
        assert received[-1] == {"type": "http.request", "more_body": False}
        assert len(last) > UPLOAD
        passed = b"".join(message["body"] for message in received[:-1]) + last.rstrip(b"\0")
        assert body.startswith(passed)
        assert 16 <= passed.count(b"text") <= 17
