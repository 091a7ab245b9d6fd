"""The service in uvicorn on a real port: the clients that people use, slow connections, and the stop."""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from onecard.serving import server as serving_server
from onecard.serving.app import Settings
from onecard.serving.service import Limits
from tests.support.paths import ROOT
from tests.support.serving_fakes import GOOD, POOR, FakeChat, Setting, events, question

PATH = "/v1/chat/completions"


@contextlib.contextmanager
def running(setting: Setting, seconds_per_head: float = 5.0):
    """A server in a thread; yields its port."""
    server = serving_server.server_of(setting.app, 0.1)
    server.config.http = type("Quick", (serving_server.Connection,), {"seconds_per_head": seconds_per_head})
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def setting():
    return Setting(FakeChat(0.002), Settings(limits=Limits(at_once=4)))


@pytest.fixture(scope="module")
def port(setting):
    with running(setting) as number:
        yield number


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=GOOD, max_retries=0) as client:
        yield client


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class TestOpenAIClient:
    """A18 with the official client of OpenAI."""

    def test_chat(self, client):
        answer = client.chat.completions.create(model="demo", messages=say("red green"), seed=1)
        assert answer.choices[0].message.content == "red green"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.total_tokens == 4
        cut = client.chat.completions.create(model="demo", messages=say("red green"), max_completion_tokens=1)
        assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == ("red", "length")

    def test_stream(self, client):
        for model in ("base", "demo"):
            options = {"include_usage": True}
            chunks = list(
                client.chat.completions.create(
                    model=model, messages=say("red 漢字 😀"), stream=True, stream_options=options, n=2
                )
            )
            texts = ["", ""]
            for chunk in chunks[:-1]:
                texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
            assert texts == ["red 漢字 😀"] * 2
            assert chunks[-1].usage.completion_tokens == 6

    def test_an_answer_can_be_sent_back(self, client):
        answer = client.chat.completions.create(model="demo", messages=say("red"))
        messages = [*say("red"), answer.choices[0].message, *say("blue")]
        assert client.chat.completions.create(model="demo", messages=messages).choices[0].message.content

    def test_completions(self, client):
        answer = client.completions.create(model="base", prompt="red green blue", max_tokens=2)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("red green", "length")
        stream = client.completions.create(model="base", prompt="red green", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "red green"

    def test_models(self, client):
        assert [model.id for model in client.models.list()] == ["base", "demo", "other"]
        assert client.models.retrieve("demo+0.5*other").id == "demo+0.5*other"

    def test_errors_have_their_classes(self, client, port):
        calls = client.chat.completions
        with pytest.raises(openai.BadRequestError) as error:
            calls.create(model="demo", messages=say("word " * 500))
        assert error.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError) as error:
            calls.create(model="demo", messages=say("x"), stream=True, tools=[{"type": "function"}])
        assert error.value.param == "tools"
        with pytest.raises(openai.NotFoundError):
            calls.create(model="gpt-4o", messages=say("x"))
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="base", input="x")
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="base", input="x")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="oc-wrong").models.list()
        with pytest.raises(openai.PermissionDeniedError):
            client.with_options(api_key=POOR).models.list()

    def test_an_error_within_a_stream_is_raised(self, client, setting):
        setting.chat.failure = RuntimeError("secret")
        try:
            with pytest.raises(openai.APIError, match="failed"):
                list(client.chat.completions.create(model="demo", messages=say("x"), stream=True))
        finally:
            setting.chat.failure = None

    def test_closing_a_stream_ends_the_answer(self, client, setting):
        """A10 over a real connection."""
        chat, before = setting.chat, setting.chat.tokens
        pause, chat.pause = chat.pause, 0.02
        try:
            stream = client.chat.completions.create(model="demo", messages=say("word " * 150), stream=True)
            for _ in range(4):
                next(stream)
            stream.close()
            client.close()
            end = time.monotonic() + 5
            while chat.open and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            chat.pause = pause
        assert not chat.open
        assert chat.tokens - before < 15


def test_langchain(port):
    """TigerBot's users had a client for LangChain."""
    how = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": GOOD, "max_retries": 0}
    chat = ChatOpenAI(model="demo", temperature=0.5, seed=1, stop_sequences=["x"], **how)
    answer = chat.invoke([("system", "Be brief."), ("human", "red green")])
    assert answer.content == "red green"
    assert answer.usage_metadata["output_tokens"] == 2
    assert "".join(str(chunk.content) for chunk in chat.stream("red green")) == "red green"
    again = chat.invoke([("human", "red"), answer, ("human", "blue")])
    assert again.content == "blue"
    assert OpenAI(model="base", max_tokens=50, **how).invoke("red") == "red"


def test_open_webui(port, setting):
    """Its calls as version 0.6 makes them: the models, a stream with usage, a title without one.

    It takes `data` of /models with `id`, reads the stream line by line, and sends the title request as a
    single message of the user with `stream` false and a limit on tokens.
    """
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}/v1", headers={"authorization": f"Bearer {GOOD}"}
    ) as web:
        listed = web.get("/models").json()
        assert {"base", "demo"} <= {model["id"] for model in listed["data"]}
        assert listed["object"] == "list"
        body = {"stream": True, "model": "demo", "stream_options": {"include_usage": True}}
        body["messages"] = [{"role": "system", "content": "Be brief."}, *say("red green")]
        with web.stream("POST", "/chat/completions", json=body) as answer:
            lines = [line for line in answer.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        title = {
            "model": "demo",
            "messages": say("Create a title"),
            "stream": False,
            "max_completion_tokens": 1000,
        }
        refused = web.post("/chat/completions", json=title)
        assert refused.status_code == 400  # more than the context of 200 tokens: said, and not cut
        title["max_completion_tokens"] = 50
        assert web.post("/chat/completions", json=title).json()["choices"][0]["message"]["content"]


def received(port: int, data: bytes, pause: float = 0.0, seconds: float = 10) -> tuple[bytes, float]:
    """What the server answers to raw bytes, and after how many seconds it closed the connection."""
    started, answer = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            for start in range(0, len(data), 1 if pause else len(data)):
                connection.sendall(data[start : start + 1] if pause else data)
                time.sleep(pause)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
    return answer, time.monotonic() - started


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 10**6, 431),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"x: y\r\n" * 10_000, 431),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01 no HTTP at all\r\n\r\n", 400),
        (b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n", 400),
        (
            b"POST /v1/models HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            400,
        ),
    ],
)
def test_raw_requests(port, data, status):
    """A5, A6: a wrong head gets its status and an end of the connection."""
    answer, _ = received(port, data)
    assert not answer or answer.startswith(b"HTTP/1.1 %d " % status)  # a reset may lose the answer
    assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200


def test_slow_heads():
    """A6: a connection that sends nothing, or a byte now and then, ends; a normal one stays."""
    with running(Setting(), seconds_per_head=0.5) as port:
        for data, pause in ((b"", 0.0), (b"GET /health HTTP/1.1\r\nhost: localh", 0.05)):
            answer, seconds = received(port, data or b"G", pause)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert seconds < 4
        whole = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(whole)
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.2)
            connection.sendall(b"GET /health HTT")  # a second request that never ends
            started, answer = time.monotonic(), b""
            while part := connection.recv(65536):
                answer += part
        assert b"HTTP/1.1 408 " in answer
        assert time.monotonic() - started < 4
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as web:
            for _ in range(3):
                assert web.get("/health").status_code == 200
                time.sleep(0.4)


@pytest.mark.parametrize("patience", [0.3, pytest.param(20, marks=pytest.mark.ci)])
def test_sigterm_drains(patience):
    """A20: ten streams end with [DONE] in time or with an error event; the exit code is 143."""
    command = [sys.executable, "-m", "tests.support.serving_process", "0.03", str(patience)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port, ends = int(process.stdout.readline()), []
        started = threading.Semaphore(0)

        def stream() -> None:
            body = question("word " * 60, stream=True)
            headers = {"authorization": f"Bearer {GOOD}"}
            address = f"http://127.0.0.1:{port}{PATH}"
            text = ""
            with httpx.stream("POST", address, json=body, headers=headers, timeout=30) as answer:
                for part in answer.iter_text():
                    if not text:
                        started.release()
                    text += part
            ends.append(events(text)[-1] if answer.status_code == 200 else answer.status_code)

        threads = [threading.Thread(target=stream) for _ in range(10)]
        for thread in threads:
            thread.start()
        for _ in range(4):  # as many are answered at once
            assert started.acquire(timeout=20)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(40)
        assert process.wait(40) == 143
    finally:
        process.kill()
        errors = process.stderr.read()
        process.stdout.close()
        process.stderr.close()
    assert len(ends) == 10
    stopped = [end for end in ends if end != "[DONE]"]
    assert all(end == 503 or end["error"]["code"] == "stopping" for end in stopped)
    assert len(stopped) == (0 if patience > 1 else 10)
    assert "Traceback" not in errors
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    assert not [line for line in lines if "error" in line]
