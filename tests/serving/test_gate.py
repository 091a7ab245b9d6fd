"""What never reaches a route: other hosts and origins, large and slow bodies, large headers."""

import asyncio
import json

import pytest

from onecard.serving import gate
from onecard.serving.app import Settings
from tests.support.serving_fakes import GOOD, Caller, Setting, question

PATH = "/v1/chat/completions"
SMALL = Settings(most_body=1000, seconds_per_body=0.2)


class Parts(Caller):
    """A caller whose body comes in parts, with headers of its own."""

    def __init__(self, app, headers, parts, pause=0.0, ends=True):
        super().__init__(app, PATH, {}, more=headers)
        self.parts, self.pause, self.ends, self.taken = list(parts), pause, ends, 0

    async def receive(self):
        if not self.parts:
            if not self.ends:
                await self.gone.wait()
            return {"type": "http.disconnect"}
        await asyncio.sleep(self.pause)
        part = self.parts.pop(0)
        self.taken += len(part)
        return {"type": "http.request", "body": part, "more_body": bool(self.parts) or not self.ends}


def status(headers=(), parts=(b"{}",), settings=SMALL, **how) -> int:
    setting = Setting(settings=settings)
    caller = asyncio.run(Parts(setting.app, headers, parts, **how).run())
    assert json.loads(caller.text)["error"]["message"]
    return caller.status


@pytest.mark.parametrize(
    ("headers", "parts", "expected"),
    [
        ([(b"content-length", b"2000")], [b"x" * 2000], 413),  # true
        ([(b"content-length", b"10")], [b"x" * 600] * 9, 413),  # lying
        ([(b"content-length", b"-1")], [b"{}"], 400),
        ([(b"content-length", b"1e3")], [b"{}"], 400),
        ([(b"content-length", b"9" * 400)], [b"{}"], 400),
        ([(b"content-length", b"2"), (b"content-length", b"3")], [b"{}"], 400),
        ([], [b"x" * 600] * 20, 413),  # missing, in parts
        ([(b"transfer-encoding", b"chunked")], [b"x"] * 1500, 413),
        ([(b"content-encoding", b"gzip")], [b"\x1f\x8b"], 415),
        ([(b"content-encoding", b"br")], [b"x"], 415),
        ([(b"content-encoding", b"identity")], [b"{}"], 400),  # an empty question
    ],
)
def test_bodies(headers, parts, expected):
    """A5: each is refused as what it is, whatever its length claims."""
    assert status(headers, parts) == expected


def test_a_large_body_is_not_kept():
    """A5: of a body without an end only some parts are taken, and none is kept."""
    setting = Setting(settings=SMALL)
    caller = Parts(setting.app, [], [b"x" * 1000] * 10_000)
    asyncio.run(caller.run())
    assert caller.status == 413
    assert caller.taken < 100_000


def test_a_slow_body_is_given_up():
    """A6: bytes that come one by one get 408 after the time for a body."""
    assert status(parts=[b"{"] * 100, pause=0.05) == 408
    assert status(parts=[b"{"], ends=False) == 408


@pytest.mark.parametrize(
    "headers",
    [[(b"x-a", b"y" * 20_000)], [(b"x-a", b"y")] * 200, [(b"x" * 17_000, b"")]],
)
def test_large_headers(headers):
    """A6"""
    assert status(headers) == 431


HOSTS = [  # Host, Origin, whether a server for this machine accepts it, and one for others
    ("localhost:8000", None, True, True),
    ("127.0.0.1", None, True, True),
    ("[::1]:8000", None, True, True),
    ("LOCALHOST", None, False, False),
    ("evil.example", None, False, False),
    ("127.0.0.1.evil.example", None, False, False),
    ("localhost.evil.example:8000", None, False, False),
    ("192.168.1.5:8000", None, False, True),
    ("box.lan:8000", None, True, True),  # listed in the settings
    ("", None, False, False),
    ("localhost:8000", "http://localhost:8000", True, True),
    ("localhost:8000", "http://localhost:3000", False, False),
    ("localhost:8000", "https://evil.example", False, False),
    ("localhost:8000", "null", False, False),
    ("localhost:8000", "", False, False),
    ("evil.example", "http://evil.example", False, False),
    ("localhost:8000", "https://chat.example", True, True),  # listed in the settings
    ("evil.example", "https://chat.example", False, False),
]


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("host", "origin", "here", "others"), HOSTS)
def test_hosts_and_origins(host, origin, here, others, local):
    """A16: another site's page, and a name that only points here, are refused even with a key."""
    settings = Settings(local=local, names=["box.lan"], origins=["https://chat.example"])
    client = Setting(settings=settings).client()
    headers = {"host": host} | ({"origin": origin} if origin is not None else {})
    expected = here if local else others
    assert client.get("/v1/models", headers=headers).status_code == (200 if expected else 403)
    assert client.get("/health", headers=headers).status_code == (200 if expected else 403)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"localhost:8000")],
        [(b"origin", b"http://localhost:8000")] * 2,
        [(b"origin", b"http://localhost:8000"), (b"origin", b"https://evil.example")],
    ],
)
def test_headers_that_come_twice(headers):
    """What another program in front of us took for the only one may be either of them."""
    assert status(headers) == 403


def test_no_answer_lets_another_site_read_it():
    answer = (
        Setting(settings=Settings(names=["testserver"], origins=["https://chat.example"]))
        .client()
        .get("/v1/models", headers={"origin": "https://chat.example"})
    )
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]


def test_a_long_address():
    assert Setting().client().get("/v1/" + "x" * 5000).status_code == 414


def test_websockets_are_closed():
    sent = []

    async def run():
        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        await gate.Gate(None, True)({"type": "websocket"}, receive, send)

    asyncio.run(run())
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_a_body_at_the_limit_is_answered():
    body = json.dumps(question("x"))
    settings = Settings(names=["testserver"], most_body=len(body))
    client = Setting(settings=settings).client(GOOD)
    headers = {"content-type": "application/json"}
    assert client.post(PATH, content=body, headers=headers).status_code == 200
    assert client.post(PATH, content=body + " ", headers=headers).status_code == 413
