"""A window can be reached only from this machine, by its own pages and, with --auth, with the password.

The tests send plain HTTP to a real server (tests/support/window_server.py); test_windows.py uses a browser.
"""

import contextlib
import http.client
import itertools
import json
import re
import resource
import select
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio as gr
import pytest
from fastapi.routing import iter_route_contexts
from gradio.route_utils import GradioMultiPartParser, MultiPartException
from gradio.routes import App
from playwright.sync_api import expect
from starlette.datastructures import Headers

from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.system import http_guard
from onecard.ui import guard
from tests.support.browser import Server, bubbles, finished, opened, serving, set_slider, status
from tests.support.coroutines import run_apart
from tests.support.training_page import eventually


def request(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Send one request; return its status and content."""
    renamed_headers = {name.replace("_", "-"): value for name, value in headers.items()}
    message = urllib.request.Request(server.address + path, data=body, headers=renamed_headers)
    try:
        with urllib.request.urlopen(message, timeout=10) as answer:
            return answer.status, _content(answer)
    except urllib.error.HTTPError as error:
        return error.code, _content(error)


def _content(answer) -> bytes:
    """The part of the answer that comes within the time, because some answers never end."""
    try:
        return answer.read()
    except (OSError, http.client.HTTPException):
        return b""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        with serving("turns", folder, "--queue=3", "--max_new_tokens=450") as window_server:
            yield window_server


def test_only_this_machine_can_connect(server):
    """W1: by default the socket listens on the loopback address and on no other."""
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text(encoding="utf-8").splitlines()[1:]:
            local, _, state = line.split()[1:4]
            address, port = local.split(":")
            if state == "0A" and int(port, 16) == server.port:
                listening.append(address)
    assert listening == ["0100007F"]  # 127.0.0.1 as Linux writes it there


def test_an_allowed_proxy_may_use_the_window(tmp_path):
    """The page of a notebook comes through a proxy: --origin admits its address and no other."""
    with serving("turns", tmp_path / "server", "--origin=https://x-7861.notebook.example/") as server:
        allowed = {"Origin": "https://x-7861.notebook.example"}
        assert request(server, "/config", **allowed)[0] == 200
        assert request(server, "/config", Host="x-7861.notebook.example", **allowed)[0] == 200
        assert request(server, "/config", Host="x-7861.notebook.example")[0] == 200
        assert request(server, "/config", Origin="https://y.notebook.example")[0] == 403
        crossed = {"Host": "x-7861.notebook.example", "Origin": "https://y.notebook.example"}
        assert request(server, "/config", **crossed)[0] == 403


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
    """W14: any other address and a public link need --auth."""
    with pytest.raises(UserError, match="--auth"):
        guard.check_exposure(ChatConfig(**options))
    guard.check_exposure(ChatConfig(**options, auth="me:secret"))


def test_public_link_has_to_be_typed(monkeypatch, capsys):
    """W14: a public link is made only after it was confirmed by a word in a terminal."""
    options = ChatConfig(share=True, auth="me:secret")
    with pytest.raises(UserError, match="confirmed in a terminal"):
        guard.confirm_share(options)
    for typed, fine in (("share\n", True), ("yes\n", False), ("", False)):
        terminal = type("Terminal", (), {"isatty": lambda self: True, "readline": lambda self, t=typed: t})
        monkeypatch.setattr("sys.stdin", terminal())
        if fine:
            guard.confirm_share(options)
        else:
            with pytest.raises(UserError, match="No link"):
                guard.confirm_share(options)
    assert "internet" in capsys.readouterr().out


def test_nothing_outside_is_read(server, tmp_path):
    """W2: over 200 ways of naming a file of this machine return no content of any."""
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
    """W5: requests from pages of other sites, and requests with foreign host names, are refused."""
    host_and_port = server.address.removeprefix("http://")
    assert request(server, "/config")[0] == 200
    assert request(server, "/config", Origin=server.address)[0] == 200
    assert request(server, "/config", Host=f"localhost:{server.port}")[0] == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1:1",
        f"http://{host_and_port}.evil.example",
        "file://",
    ):
        for path in ("/config", "/gradio_api/queue/join", "/gradio_api/upload", "/"):
            assert request(server, path, Origin=origin)[0] == 403, (origin, path)
            assert request(server, path, b"{}", Origin=origin, Content_Type="text/plain")[0] == 403
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "[::ffff:7f00:1]"):
        assert request(server, "/config", Host=host)[0] == 403, host


def question(server: Server, session: str) -> tuple[int, bytes]:
    """Send one question in the way in which the page of this session sends it."""
    config = json.loads(request(server, "/config")[1])
    endpoint = max(config["dependencies"], key=lambda one: len(one["inputs"]))  # a question sends all inputs
    parts = {part["id"]: part for part in config["components"]}
    values = [parts[number]["props"].get("value") for number in endpoint["inputs"]]
    values = ["" if value is None else value for value in values]
    values[0] = "Say everything"
    data = {"data": values, "fn_index": endpoint["id"], "session_hash": session}
    body = json.dumps(data).encode()
    return request(server, "/gradio_api/queue/join", body, Content_Type="application/json")


def listening(server: Server, session: str) -> http.client.HTTPConnection:
    """A page that waits for its answer; without one gradio frees the place in the queue."""
    stream = http.client.HTTPConnection("127.0.0.1", server.port)
    stream.request("GET", f"/gradio_api/queue/data?session_hash={session}")
    return stream


def test_flood_of_questions_is_bounded(server):
    """W6: of 200 clicks at once --queue many wait, and the others learn that the queue is full."""
    answers, pages = [], []
    for number in range(200):
        answers.append(question(server, f"flood{number}"))
        if answers[-1][0] == 200:
            pages.append(listening(server, f"flood{number}"))
    refused = [content for status, content in answers if status != 200]
    assert len(answers) - len(refused) <= 3 + 4 + 1  # waiting, being answered, and one between them
    assert all(b"full" in content.lower() for content in refused)
    for page in pages:
        page.close()
    assert request(server, "/config")[0] == 200


def test_stop_while_a_question_waits_for_its_turn(browser, server):
    """While others are answered, Stop takes effect when the turn comes; the question is back in its box."""
    others = []
    for number in range(4):
        assert question(server, f"busy{number}")[0] == 200
        others.append(listening(server, f"busy{number}"))
    with opened(browser, server, "#box textarea") as page:
        page.fill("#box textarea", "Say late 5")
        page.press("#box textarea", "Enter")
        page.wait_for_selector("#stop:visible")
        assert bubbles(page) == []
        page.click("#stop")
        expect(page.locator("#status")).to_contain_text("waiting for other answers to finish")
        page.wait_for_timeout(500)
        for other in others:
            other.close()
        finished(page)
        assert "stopped" in status(page)
        assert bubbles(page) == []
        assert page.input_value("#box textarea") == "Say late 5"


@contextlib.contextmanager
def full(server: Server, places: int) -> Iterator[None]:
    """Other pages occupy all places for answers and for waiting until the end of the block."""
    pages = []
    for number in range(places):
        eventually(lambda name=f"other{number}": question(server, name)[0] == 200)  # an earlier one moves up
        pages.append(listening(server, f"other{number}"))
    try:
        yield
    finally:
        for page in pages:
            page.close()


@pytest.mark.parametrize(
    ("kind", "lang", "told"),
    [
        ("turns", "en", "Too many questions are waiting, so yours was not accepted. Ask again in a moment."),
        ("single", "zh", "等待回答的问题太多，您的问题未被接受，请稍后再试。"),
    ],
)
def test_who_is_refused_by_a_full_queue_is_told(browser, tmp_path, kind, lang, told):
    """W6: the notice is in the language of the page; the question stays and can be asked again later."""
    box, answer = ("box", "left") if kind == "turns" else ("instruction", "output")
    options = ["--queue=1", "--max_new_tokens=450", "--mode=greedy", f"--lang={lang}"]
    with (
        serving(kind, tmp_path / "server", *options) as server,
        opened(browser, server, f"#{box} textarea") as page,
    ):
        set_slider(page, "max_new_tokens", "30")
        page.fill(f"#{box} textarea", "Say late 6")
        with full(server, 4 + 1):
            page.click("#send")
            expect(page.locator("#status [role=alert]")).to_have_text(told)
            finished(page)
            assert page.input_value(f"#{box} textarea") == "Say late 6"
        eventually(lambda: is_taken(page), 90)  # a place in the queue is free some time after an answer
        finished(page)
        assert page.locator("#status [role=alert]").count() == 0
        assert page.inner_text(f"#{answer}").strip() != ""


def is_taken(page) -> bool:
    """Send the question in the box, and return whether it is answered."""
    numbers = page.locator("#status").filter(has_text="/ 512")
    page.click("#send")  # an earlier notice stays until another one replaces it
    with contextlib.suppress(AssertionError):
        expect(numbers).to_be_visible(timeout=5000)
    finished(page)
    return numbers.count() == 1


def upload(server: Server, content: bytes) -> tuple[int, bytes]:
    boundary = "------------------------onecard"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="chat.jsonl"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    kind = f"multipart/form-data; boundary={boundary}"
    return request(server, "/gradio_api/upload", body, Content_Type=kind)


def test_nobody_gets_what_another_has_uploaded(server):
    """W3: an upload cannot be read, not even by the path that its owner got, however it is written."""
    status, content = upload(server, b"canary-4712")
    assert status == 200
    [path] = json.loads(content)
    assert Path(path).read_bytes() == b"canary-4712"
    ways = ["/gradio_api/file=", "/file=", "/gradio_api/file/", "/file/", "//file=", "/gradio_api//file="]
    for way in ways:
        for name in (path, path.replace("/", "%2f"), path.lstrip("/")):
            status, content = request(server, way + name)
            assert b"canary" not in content
            assert status in (403, 404), way


def test_no_address_is_fetched_for_a_page(server):
    """W13: the server fetches no address, neither for gradio's proxy route nor as an uploaded file."""
    with socket.socket() as target:
        target.bind(("127.0.0.1", 0))
        target.listen()
        target.setblocking(False)
        port = target.getsockname()[1]
        for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "x.hf.space", "2130706433"):
            for way in ("/gradio_api/proxy=", "/proxy=", "/gradio_api/file=", "/gradio_api/stream/"):
                assert request(server, f"{way}http://{host}:{port}/a")[0] in (403, 404), (way, host)
        config = json.loads(request(server, "/config")[1])
        loads = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "load"]
        [endpoint] = [one for one in config["dependencies"] if one["inputs"][:1] == loads]
        address = f"http://127.0.0.1:{port}/chat.jsonl"
        file = {"path": address, "url": address, "meta": {"_type": "gradio.FileData"}}
        values = [file, *[1.0] * (len(endpoint["inputs"]) - 1)]
        for way in ("queue/join", "run/predict"):
            data = {"data": values, "fn_index": endpoint["id"], "session_hash": "url"}
            body = json.dumps(data).encode()
            request(server, f"/gradio_api/{way}", body, Content_Type="application/json")
        request(server, "/gradio_api/queue/data?session_hash=url")  # returns when its answer has come
        with pytest.raises(BlockingIOError):
            target.accept()


def test_upload_is_limited(server):
    """W4: a file over the limit is refused and leaves nothing behind."""
    status, _ = upload(server, b"x" * (21 << 20))
    assert status == 413
    assert kept_bytes(server) < 1 << 20


@pytest.mark.parametrize("count", [1001, 5000])
def test_very_many_files_are_refused(server, count):
    """W4: a request with 1,001 files is refused before they are on the disk, and nothing of it stays.

    The server may open as many files as most systems allow, so it must not open one for each of these.
    """
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    before, peak, open_files = kept_files(server), peak_memory(server), len(descriptors(server))
    boundary = "------------------------onecard"
    part = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="rows.json"\r\n'
        "Content-Type: application/json\r\n\r\n[]\r\n"
    )
    body = (part * count + f"--{boundary}--\r\n").encode()
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        kind = f"multipart/form-data; boundary={boundary}"
        assert request(server, "/gradio_api/upload", body, Content_Type=kind)[0] == 413
    finally:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
    assert kept_files(server) == before
    assert peak_memory(server) - peak < 64 << 20
    assert len(descriptors(server)) <= open_files + 10
    assert upload(server, b"one file")[0] == 200


@pytest.mark.parametrize("count", [0, 1, 16, 17, 18, 40])
@pytest.mark.parametrize("size", [1, 7, 61, 1000, 100_000])
def test_files_are_counted_wherever_their_request_is_cut(tmp_path, count, size):
    """W4: 16 files pass as they are, and more end as one that is too large, which gradio deletes with all."""
    border = b"--a-border"
    part = border + b'\r\nContent-Disposition: form-data; name="files"; filename="r.json"\r\n\r\n[--a-]\r\n'
    body = part * count + border + b"--\r\n"
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    headers = {"content-type": "multipart/form-data; boundary=a-border"}
    messages = iter([{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks])

    async def receive() -> dict:
        return next(messages, {"type": "http.request", "body": b"", "more_body": False})

    outcome = []

    async def application(scope, receive, send) -> None:
        async def stream():
            more = True
            while more:
                message = await receive()
                more = message["more_body"]
                yield message["body"]

        parser = GradioMultiPartParser(
            Headers(headers), stream(), max_file_size=http_guard.UPLOAD, upload_dir=str(tmp_path)
        )
        try:
            outcome.append(len((await parser.parse()).getlist("files")))
        except MultiPartException as error:
            outcome.append(error.message)

    scope = {"type": "http", "path": "/gradio_api/upload", "headers": [(b"host", b"localhost")]}
    scope["headers"] += [(name.encode(), value.encode()) for name, value in headers.items()]
    guarded = http_guard.Guard(application, local=True, login=False, origin="")
    run_apart(guarded(scope, receive, None))
    if count <= http_guard.FILES:
        assert outcome == [count]
    else:
        assert "File size exceeded" in outcome[0]
        assert list(tmp_path.iterdir()) == []


def start_upload(server: Server, size: int) -> socket.socket:
    """A connection on which a file of this many bytes was announced."""
    head = (
        f"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {size}\r\n"
        "Content-Type: multipart/form-data; boundary=one\r\n\r\n"
        '--one\r\nContent-Disposition: form-data; name="files"; filename="chat.jsonl"\r\n\r\n'
    )
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(head.encode())
    return connection


def kept_files(server: Server) -> list[Path]:
    return sorted(path for path in (server.folder / "gradio").rglob("*") if path.is_file())


def descriptors(server: Server) -> list[Path]:
    """The open files of the server."""
    return list(Path(f"/proc/{server.process.pid}/fd").iterdir())


def kept_bytes(server: Server) -> int:
    return sum(path.stat().st_size for path in (server.folder / "gradio").rglob("*") if path.is_file())


def peak_memory(server: Server) -> int:
    """The peak memory of the server in bytes."""
    status_text = Path(f"/proc/{server.process.pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status_text)[1]) << 10


def test_very_large_upload_is_refused_early(server):
    """W4: of 1 GiB the server accepts little more than the limit, and keeps nothing of it."""
    before, peak = kept_bytes(server), peak_memory(server)
    sent, block = 0, bytes(1 << 20)
    with start_upload(server, 1 << 30) as connection:
        while sent < 1 << 30 and not select.select([connection], [], [], 0)[0]:
            connection.sendall(block)
            sent += len(block)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    assert sent < 64 << 20
    assert peak_memory(server) - peak < 64 << 20
    assert request(server, "/config")[0] == 200
    assert kept_bytes(server) == before


def test_aborted_upload_leaves_nothing(server):
    """W4: after a connection is lost half way, the server still works."""
    before = kept_bytes(server)
    with start_upload(server, 10 << 20) as connection:
        connection.sendall(bytes(5 << 20))
    until = time.monotonic() + 20
    while kept_bytes(server) != before and time.monotonic() < until:
        time.sleep(0.1)
    assert kept_bytes(server) == before
    assert request(server, "/config")[0] == 200


OPEN = {  # paths that answer without the password: the login, and files that are the same for everybody
    "/",
    "/login",
    "/login/",
    "/logout",
    "/assets/{path:path}",
    "/favicon.ico",
    "/gradio_api/startup-events",
    "/manifest.json",
    "/pwa_icon",
    "/pwa_icon/{size}",
    "/robots.txt",
    "/static/{path:path}",
    "/svelte/{path:path}",
    "/theme.css",
}


def answered(server: Server, method: str, path: str) -> int:
    """Status of a request with every placeholder filled; redirections are not followed."""
    filled = re.sub(r"\{\w+(:\w+)?\}", "x", path)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    body = b"{}" if method == "POST" else None
    connection.request(method, filled, body, {"Content-Type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


def test_every_route_asks_for_the_password(tmp_path):
    """W11: with --auth only the login page can be reached without a password."""
    with gr.Blocks() as blocks:
        gr.Textbox()
    routes = list(iter_route_contexts(App.create_app(blocks).routes))
    routes_and_methods = [(method, route.path) for route in routes for method in route.methods]
    assert ("POST", "/gradio_api/queue/join") in routes_and_methods
    with serving("turns", tmp_path / "server", "--auth=me:secret") as server:
        statuses = {(method, path): answered(server, method, path) for method, path in routes_and_methods}
        open_paths = {path for (_, path), status in statuses.items() if status not in (401, 403)}
        assert open_paths == OPEN, {
            one: status for one, status in statuses.items() if one[1] in open_paths - OPEN
        }
        page_without = request(server, "/")[1]
        assert b"auth_required" in page_without
        assert b"adapter1" not in page_without
        login = b"username=me&password=secret"
        form = "application/x-www-form-urlencoded"
        assert request(server, "/login", b"username=me&password=wrong", Content_Type=form)[0] == 400
        assert request(server, "/login", login, Content_Type=form)[0] == 200
