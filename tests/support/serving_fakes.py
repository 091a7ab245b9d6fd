"""A chat without a model, keys without a store, and clients for tests of the HTTP service."""

import asyncio
import collections
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from onecard.config.generation import TRAINED, ActiveAdapters, Generation
from onecard.config.serving import SCOPES
from onecard.data.conversation import Conversation
from onecard.errors import UserError
from onecard.inference import decoding
from onecard.inference.chat import Reply
from onecard.inference.controls import NONE as NO_CONTROLS
from onecard.inference.controls import Controls
from onecard.inference.detokenizer import PartialText
from onecard.serving.app import Doors, Settings, create_app
from onecard.serving.keys import Key, Refusal
from onecard.serving.models import Models

GOOD, ADMIN, POOR = "oc-good-0123456789", "oc-admin-0123456789", "oc-poor-0123456789"  # secrets

VOCABULARY = 300


KEYS = {
    GOOD: Key("k1", "ann", "ann", frozenset({"chat"}), 600, None),
    ADMIN: Key("k2", "root", "root", frozenset(SCOPES), 600, None),
    POOR: Key("k3", "bob", "bob", frozenset(), 600, None),
}


class FakeEngine:
    """The part of an engine that the service asks."""

    name, context = "fake", 200
    is_loaded = True

    def __init__(self, adapters: tuple[str, ...] = ("demo", "other")):
        self.adapters = list(adapters)

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        for name, _ in active_adapters:
            if name not in self.adapters:
                raise UserError(f"No adapter is called {name}.", "Loaded: demo.")


class FakeChat:
    """Answers with the words of the question, one per token; a word of the prompt is a token too.

    `pause`: seconds per token; `tokens`: tokens of all answers so far; `open`: answers in progress.
    """

    def __init__(self, pause: float = 0.0, engine: FakeEngine | None = None):
        self.pause, self.engine = pause, engine or FakeEngine()
        self.asked: list[tuple[Conversation, Generation, ActiveAdapters]] = []
        self.tokens, self.open, self.most_open = 0, 0, 0
        self.after_cancel = 0  # tokens after the caller was gone
        self.lock = threading.Lock()
        self.reading = threading.Event()  # set while a prompt is read
        self.prompt_parts = 1
        self.failure: BaseException | None = None

    def prompt_tokens(self, conversation: Conversation, template_name: str = TRAINED) -> int:
        return sum(len(turn.text.split()) for turn in conversation.turns)

    def check(self, settings: Generation, controls: Controls, template_name: str = TRAINED) -> None:
        controls.check(settings, VOCABULARY)

    def stream(
        self,
        conversation: Conversation,
        settings: Generation,
        active_adapters: ActiveAdapters | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        template_name: str = TRAINED,
        controls: Controls = NO_CONTROLS,
    ) -> Iterator[Reply]:
        self.controls = controls
        with self.lock:
            self.asked.append((conversation, settings, active_adapters or ()))
            self.open += 1
            self.most_open = max(self.most_open, self.open)
        try:
            yield from self._stream(conversation, settings, cancelled)
        finally:
            with self.lock:
                self.open -= 1
            self.reading.clear()

    def _stream(
        self, conversation: Conversation, settings: Generation, cancelled: Callable[[], bool]
    ) -> Iterator[Reply]:
        prompt = self.prompt_tokens(conversation)
        for part in range(self.prompt_parts):
            self.reading.set()
            time.sleep(self.pause)
            if cancelled():
                yield _reply("", 0, decoding.CANCELLED, prompt)
                return
            if part + 1 < self.prompt_parts:
                yield _reply("", 0, "", prompt)
        self.reading.clear()
        if self.failure:
            raise self.failure
        words, text = conversation.turns[-1].text.split(), ""
        for number, word in enumerate(words[: settings.max_new_tokens], 1):
            time.sleep(self.pause)
            with self.lock:
                self.tokens += 1
                self.after_cancel += cancelled()
            text = f"{text} {word}".strip()
            if cancelled():
                yield _reply(text, number, decoding.CANCELLED, prompt)
                return
            yield _reply(text, number, "", prompt)
        finished = decoding.LENGTH if len(words) > settings.max_new_tokens else decoding.END
        yield _reply(text, min(len(words), settings.max_new_tokens), finished, prompt)


def _reply(text: str, tokens: int, finished: str, prompt: int) -> Reply:
    return Reply(PartialText(text, "", (text,), tokens, finished), prompt, prompt, 0, 0, 0.1, 0.1)


class FakeDoors:
    """Keys of a table, and as many requests as a test allows."""

    def __init__(self) -> None:
        self.keys: dict[str, Key | Refusal] = dict(KEYS)
        self.failure: Exception | None = None
        self.wait_seconds: dict[str, float] = {}  # key id -> what it has to wait
        self.unknown: collections.Counter[str] = collections.Counter()
        self.most_unknown = 10**9

    def doors(self) -> Doors:
        return Doors(self._find, lambda key: self.wait_seconds.get(key.id, 0.0), self._wait_unknown)

    def _find(self, secret: str) -> Key | Refusal:
        if self.failure:
            raise self.failure
        return self.keys.get(secret, Refusal.UNKNOWN)

    def _wait_unknown(self, address: str) -> float:
        self.unknown[address] += 1
        return 30.0 if self.unknown[address] > self.most_unknown else 0.0


class Setting:
    """An application on fakes, and what it has logged."""

    def __init__(self, chat: FakeChat | None = None, settings: Settings | None = None):
        self.chat, self.doors, self.lines = chat or FakeChat(), FakeDoors(), []
        self.app: FastAPI = create_app(
            Models(self.chat),
            self.doors.doors(),
            settings or Settings(names=["testserver"]),
            self.lines.append,
        )

    def client(self, secret: str | None = GOOD) -> TestClient:
        headers = {"authorization": f"Bearer {secret}"} if secret else {}
        return TestClient(self.app, headers=headers, raise_server_exceptions=False)


def question(text: str = "one two three", **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], **more}


def events(text: str) -> list[Any]:
    """The data of each event of a stream; comments are left out."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [each if each == "[DONE]" else json.loads(each) for each in data]


class Caller:
    """One request to an ASGI application whose caller can leave at any moment."""

    def __init__(self, app: Any, path: str, body: dict[str, Any], secret: str = GOOD, more: Any = ()):
        """more: headers besides the usual ones."""
        self.more = list(more)
        self.app, self.path, self.body = app, path, json.dumps(body).encode()
        self.secret, self.gone = secret, asyncio.Event()
        self.sent: list[Any] = []
        self.received = False

    async def receive(self) -> dict[str, Any]:
        if not self.received:
            self.received = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    async def run(self) -> "Caller":
        headers = [
            (b"host", b"localhost:8000"),
            (b"authorization", f"Bearer {self.secret}".encode()),
            (b"content-type", b"application/json"),
            *self.more,
        ]
        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": "POST", "path": self.path, "raw_path": self.path.encode(), "query_string": b""}
        scope |= {"headers": headers, "client": ("127.0.0.1", 1), "server": ("localhost", 8000)}
        scope |= {"scheme": "http", "root_path": "", "state": {}}
        await self.app(scope, self.receive, self.send)
        return self

    @property
    def status(self) -> int:
        return self.sent[0]["status"] if self.sent else 0

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until something is so; fails after some seconds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.002)


@contextlib.contextmanager
def closing(setting: Setting) -> Iterator[Setting]:
    try:
        yield setting
    finally:
        setting.app.state.service.close()
