"""Who may reach a window: this machine alone, its own pages alone, and with a password nobody without it.

Plain HTTP against a real server (tests/window_server.py); the browser's side is test_windows.py.
"""

import http.client
import itertools
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from onecard import page
from onecard.chat_config import ChatConfig
from onecard.errors import UserError
from tests.test_windows import Server, serving


def request(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """(status, content) of one request."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    asked = urllib.request.Request(server.address + path, data=body, headers=named)
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return answer.status, _content(answer)
    except urllib.error.HTTPError as error:
        return error.code, _content(error)


def _content(answer) -> bytes:
    """What comes within the time: some answers never end."""
    try:
        return answer.read()
    except (OSError, http.client.HTTPException):
        return b""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        with serving("turns", folder, "--queue=3", "--max_new_tokens=450") as made:
            yield made


def test_only_this_machine_can_connect(server):
    """W1: by default the socket listens on the loopback address, on no other."""
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, port = local.split(":")
            if state == "0A" and int(port, 16) == server.port:
                listening.append(address)
    assert listening == ["0100007F"]  # 127.0.0.1, in the order of the wire


def test_an_allowed_proxy_may_use_the_window(tmp_path):
    """A notebook's page comes through a proxy: with --origin its address is let in, no other."""
    with serving("turns", tmp_path / "server", "--origin=https://x-7861.notebook.example/") as server:
        allowed = {"Origin": "https://x-7861.notebook.example"}
        assert request(server, "/config", **allowed)[0] == 200
        assert request(server, "/config", Host="x-7861.notebook.example", **allowed)[0] == 200
        assert request(server, "/config", Host="x-7861.notebook.example")[0] == 200
        assert request(server, "/config", Origin="https://y.notebook.example")[0] == 403


@pytest.mark.parametrize(
    "options",
    [
        {"server_name": "0.0.0.0"},
        {"server_name": "192.168.1.4"},
        {"server_name": "::"},
        {"server_name": "my-machine"},
        {"share": True},
    ],
)
def test_others_only_with_a_password(options):
    """W14: any other address, and a public link, ask for --auth."""
    with pytest.raises(UserError, match="--auth"):
        page.check_exposure(ChatConfig(**options))
    page.check_exposure(ChatConfig(**options, auth="me:secret"))


def test_public_link_has_to_be_typed(monkeypatch, capsys):
    """W14: a link that the whole internet can open is confirmed by a word in a terminal, or not made."""
    options = ChatConfig(share=True, auth="me:secret")
    with pytest.raises(UserError, match="confirmed in a terminal"):
        page.confirm_share(options)
    for typed, fine in (("share\n", True), ("yes\n", False), ("", False)):
        terminal = type("Terminal", (), {"isatty": lambda self: True, "readline": lambda self, t=typed: t})
        monkeypatch.setattr("sys.stdin", terminal())
        if fine:
            page.confirm_share(options)
        else:
            with pytest.raises(UserError, match="No link"):
                page.confirm_share(options)
    assert "internet" in capsys.readouterr().out


def test_nothing_outside_is_read(server, tmp_path):
    """W2: over 200 ways of naming a file of this machine through the server give none of it."""
    secret = tmp_path / "secret.txt"
    secret.write_text("canary-4711", encoding="utf-8")
    ups = ["../", "..%2f", "..%5c", "%2e%2e/", "%2e%2e%2f", "....//", "..;/", "..%252f", "..%c0%af"]
    starts = ["/gradio_api/file=", "/file=", "/static/", "/assets/", "/gradio_api/", "/custom_component/"]
    paths = [
        start + up * depth + "etc/passwd" for start, up, depth in itertools.product(starts, ups, (1, 4, 9))
    ]
    for start in starts:
        paths += [
            f"{start}{name}" for name in ("/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "/etc/passwd%00")
        ]
        paths += [
            f"{start}{name}" for name in (str(secret), "pyproject.toml", ".env", ".git/config", "C:%5c")
        ]
        paths += [f"{start}{server.folder}/log", f"{start}{server.folder}/model/config.json"]
    assert len(paths) >= 200
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda path: (path, *request(server, path)), paths))
    leaks = [
        (path, status)
        for path, status, content in answers
        if any(
            mark in content
            for mark in (b"root:x", b"canary-4711", b"build-backend", b"hidden_size", b"Open http")
        )
    ]
    assert leaks == []
    assert {status for _, status, _ in answers} <= {400, 401, 403, 404, 405, 422}, "an error of the server"


def test_other_sites_are_refused(server):
    """W5: requests that another site's page sends, and names that only point here, get nothing."""
    own = server.address.removeprefix("http://")
    assert request(server, "/config")[0] == 200
    assert request(server, "/config", Origin=server.address)[0] == 200
    assert request(server, "/config", Host=f"localhost:{server.port}")[0] == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"http://{own}.evil.example",
        "file://",
    ):
        for path in ("/config", "/gradio_api/queue/join", "/gradio_api/upload", "/"):
            assert request(server, path, Origin=origin)[0] == 403, (origin, path)
            assert request(server, path, b"{}", Origin=origin, Content_Type="text/plain")[0] == 403
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "[::ffff:7f00:1]"):
        assert request(server, "/config", Host=host)[0] == 403, host


def test_flood_of_questions_is_bounded(server):
    """W6: of many clicks at once as many wait as --queue says; the others are told that it is full."""
    config = json.loads(request(server, "/config")[1])
    endpoint = max(config["dependencies"], key=lambda one: len(one["inputs"]))  # a question goes with all
    parts = {part["id"]: part for part in config["components"]}
    shown = [parts[number]["props"].get("value") for number in endpoint["inputs"]]
    values = ["" if value is None else value for value in shown]
    values[0] = "Say everything"
    answers, listening = [], []
    for number in range(40):
        stream = http.client.HTTPConnection("127.0.0.1", server.port)
        data = {"data": values, "fn_index": endpoint["id"], "session_hash": f"flood{number}"}
        body = json.dumps(data).encode()
        answers.append(request(server, "/gradio_api/queue/join", body, Content_Type="application/json"))
        if answers[-1][0] == 200:  # a page listens for its answer; without it gradio gives the place away
            stream.request("GET", f"/gradio_api/queue/data?session_hash=flood{number}")
            listening.append(stream)
    refused = [content for status, content in answers if status != 200]
    assert len(answers) - len(refused) <= 3 + 4 + 1  # waiting, being answered, one between both
    assert all(b"full" in content.lower() for content in refused)
    for stream in listening:
        stream.close()
    assert request(server, "/config")[0] == 200


def test_upload_is_limited(server):
    """W4: a file over the limit is refused and leaves nothing behind."""
    boundary = "------------------------onecard"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="big.jsonl"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + b"x" * (21 << 20) + f"\r\n--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    status, _ = request(server, "/gradio_api/upload", body, Content_Type=kind)
    assert status == 413
    left = [path for path in (server.folder / "gradio").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < 1 << 20


def test_every_route_asks_for_the_password(tmp_path):
    """W11: with --auth nothing but the login answers without it; with it the page is there."""
    with serving("turns", tmp_path / "server", "--auth=me:secret") as server:
        closed = [
            "/config",
            "/gradio_api/info",
            "/gradio_api/queue/data?session_hash=x",
            "/gradio_api/queue/status",
            "/gradio_api/file=x",
            "/gradio_api/heartbeat/x",
            "/gradio_api/upload_progress?upload_id=x",
        ]
        posts = [
            "/gradio_api/queue/join",
            "/gradio_api/upload",
            "/gradio_api/run/ask",
            "/gradio_api/call/ask",
        ]
        posts += ["/gradio_api/reset", "/gradio_api/component_server", "/gradio_api/cancel"]
        answered = {path: request(server, path)[0] for path in closed}
        answered |= {path: request(server, path, b"{}", Content_Type="application/json")[0] for path in posts}
        opened = {path: status for path, status in answered.items() if status not in (401, 403, 404, 405)}
        assert opened == {}
        page_without = request(server, "/")[1]
        assert b"auth_required" in page_without
        assert b"adapter1" not in page_without
        login = b"username=me&password=secret"
        form = "application/x-www-form-urlencoded"
        assert request(server, "/login", b"username=me&password=wrong", Content_Type=form)[0] == 400
        assert request(server, "/login", login, Content_Type=form)[0] == 200
