"""Streams, callers that leave, overload and the stop of the server, on a fake chat in one event loop."""

import asyncio
import gc

import pytest
from fastapi.sse import format_sse_event

from onecard.errors import UserError
from onecard.serving.answers import Task
from onecard.serving.app import Settings
from onecard.serving.service import Limits
from tests.support.serving_fakes import (
    ADMIN,
    GOOD,
    KEYS,
    Caller,
    FakeChat,
    Setting,
    closing,
    events,
    question,
    until,
)

PATH = "/v1/chat/completions"
PAUSE = 0.01  # seconds per token
LONG = "word " * 100


def one_at_a_time(chat: FakeChat, **limits) -> Setting:
    return Setting(chat, Settings(limits=Limits(**{"at_once": 1, "most_waiting": 8, **limits})))


def pieces(caller: Caller) -> int:
    return sum(b"content" in message.get("body", b"") for message in caller.sent)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("choices", [1, 3])
def test_a_caller_that_leaves_ends_its_answer(stream, choices):
    """A10, A11: within two tokens, and its place is free for others."""
    chat = FakeChat(PAUSE)

    async def run(setting) -> None:
        caller = Caller(setting.app, PATH, question(LONG, stream=stream, n=choices))
        task = asyncio.create_task(caller.run())
        await until(lambda: chat.tokens >= 3)
        caller.gone.set()
        tokens = chat.tokens
        await task
        await until(lambda: chat.open == 0)
        assert chat.tokens - tokens <= 2
        await until(lambda: setting.app.state.service.turns.answering == 0)
        assert len(chat.asked) == 1
        following = await Caller(setting.app, PATH, question("red")).run()
        assert following.status == 200

    with closing(one_at_a_time(chat)) as setting:
        asyncio.run(run(setting))
    assert setting.lines[0]["completion_tokens"] < 10
    assert setting.lines[0]["status"] == (200 if stream else 499)


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_while_its_prompt_is_read(stream):
    """A11: the prompt is not read to its end, and no token is made."""
    chat = FakeChat(PAUSE)
    chat.prompt_parts = 500

    async def run(setting) -> None:
        caller = Caller(setting.app, PATH, question(LONG, stream=stream))
        task = asyncio.create_task(caller.run())
        await until(chat.reading.is_set)
        caller.gone.set()
        await task
        await until(lambda: chat.open == 0, 1)
        assert chat.tokens == 0

    with closing(one_at_a_time(chat)) as setting:
        asyncio.run(run(setting))


@pytest.mark.parametrize("stream", [True, False])
def test_a_caller_that_leaves_the_queue(stream):
    """A11: its question is never asked, and those behind it move up."""
    chat = FakeChat(PAUSE)

    async def run(setting) -> None:
        turns = setting.app.state.service.turns
        first = asyncio.create_task(Caller(setting.app, PATH, question("word " * 30)).run())
        await until(lambda: chat.open == 1)
        waiting = Caller(setting.app, PATH, question("gone", stream=stream))
        tasks = [asyncio.create_task(waiting.run())]
        await until(lambda: turns.waiting == 1)
        tasks.append(asyncio.create_task(Caller(setting.app, PATH, question("stays")).run()))
        await until(lambda: turns.waiting == 2)
        waiting.gone.set()
        await tasks[0]
        assert turns.waiting == 1
        assert (await tasks[1]).status == 200
        assert (await first).status == 200
        texts = [conversation.turns[0].text for conversation, _, _ in chat.asked]
        assert "gone" not in texts
        assert texts[-1] == "stays"

    with closing(one_at_a_time(chat)) as setting:
        asyncio.run(run(setting))


def test_200_callers_at_once():
    """A9: the queue is bounded, everyone is answered, and no place is lost."""
    chat = FakeChat(0.002)

    async def run(setting) -> list[Caller]:
        callers = [
            Caller(
                setting.app, PATH, question("red green", stream=number % 2 == 0), (GOOD, ADMIN)[number % 2]
            )
            for number in range(200)
        ]
        async with asyncio.timeout(20):
            return await asyncio.gather(*(caller.run() for caller in callers))

    with closing(Setting(chat, Settings(limits=Limits(at_once=2, most_waiting=20)))) as setting:
        callers = asyncio.run(run(setting))
        turns = setting.app.state.service.turns
        statuses = [caller.status for caller in callers]
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 20
        assert all(int(caller.headers["retry-after"]) >= 1 for caller in callers if caller.status == 429)
        assert chat.most_open <= 2
        assert (turns.answering, turns.waiting) == (0, 0)


def test_a_stream_without_news_gets_comments():
    chat = FakeChat(0.2)

    async def run(setting) -> Caller:
        return await Caller(setting.app, PATH, question("red", stream=True)).run()

    with closing(one_at_a_time(chat, keep_alive=0.05)) as setting:
        caller = asyncio.run(run(setting))
    assert caller.text.startswith(format_sse_event(comment="waiting").decode())
    assert events(caller.text)[-1] == "[DONE]"


def test_an_error_after_the_first_byte_is_an_event():
    class Failing(FakeChat):
        def _stream(self, conversation, settings, cancelled):
            yield from list(super()._stream(conversation, settings, cancelled))[:2]
            raise RuntimeError("secret")

    async def run(setting) -> Caller:
        return await Caller(setting.app, PATH, question("red green blue", stream=True)).run()

    with closing(Setting(Failing())) as setting:
        caller = asyncio.run(run(setting))
    assert caller.status == 200
    *_, last = events(caller.text)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in caller.text


def test_checks_come_before_the_first_byte():
    """A wrong request for a stream has a true status, in the queue too."""
    chat = FakeChat(PAUSE)

    async def run(setting) -> list[int]:
        first = asyncio.create_task(Caller(setting.app, PATH, question("word " * 30)).run())
        await until(lambda: chat.open == 1)
        wrong = [question("word " * 999), question(n=99), question() | {"model": "x"}]
        statuses = [(await Caller(setting.app, PATH, body | {"stream": True}).run()).status for body in wrong]
        assert not first.done()
        await first
        return statuses

    with closing(one_at_a_time(chat)) as setting:
        assert asyncio.run(run(setting)) == [400, 400, 404]


@pytest.mark.parametrize("patience", [5.0, 0.05])
def test_the_stop_drains(patience):
    """A20: within its patience all running answers are completed; after it, each gets an error event."""
    chat = FakeChat(PAUSE)

    async def run(setting) -> tuple[list[Caller], Caller, Caller]:
        service = setting.app.state.service
        running = [Caller(setting.app, PATH, question("word " * 20, stream=True)) for _ in range(10)]
        tasks = [asyncio.create_task(caller.run()) for caller in running]
        await until(lambda: all(pieces(caller) > 3 for caller in running))
        waiting = Caller(setting.app, PATH, question("waits"))
        tasks.append(asyncio.create_task(waiting.run()))
        await until(lambda: service.turns.waiting == 1)
        stop = asyncio.create_task(service.stop(patience))
        await asyncio.sleep(0)
        late = await Caller(setting.app, PATH, question("late")).run()
        await asyncio.gather(stop, *tasks)
        return running, waiting, late

    with closing(Setting(chat, Settings(limits=Limits(at_once=10, most_waiting=5)))) as setting:
        running, waiting, late = asyncio.run(run(setting))
        assert setting.app.state.service.turns.answering == 0
        ready = setting.client(None).get("/ready", headers={"host": "localhost"})
    assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
    assert late.status == 503
    ends = [events(caller.text)[-1] for caller in running]
    if patience > 1:
        assert ends == ["[DONE]"] * 10
        assert waiting.status == 200
    else:
        assert [end["error"]["code"] for end in ends] == ["stopping"] * 10
        assert waiting.status == 503


def test_a_question_that_cannot_be_answered_is_not_kept():
    """An error that every refusal shared would hold its last cause, and with that what a caller has asked."""

    def load() -> None:
        raise UserError("The file is gone.")

    chat = FakeChat()
    chat.engine.is_loaded, chat.engine.load = False, load
    with closing(Setting(chat)) as setting:
        assert asyncio.run(Caller(setting.app, PATH, question("a secret")).run()).status == 503
        gc.collect()
        assert [each for each in gc.get_objects() if type(each) is Task] == []


@pytest.mark.parametrize("steps", range(6))
def test_a_place_that_comes_as_its_caller_leaves_is_given_back(steps):
    """However many steps of the event loop lie between the two, the place is used or free again."""

    async def run(service) -> None:
        await service.turns.take("other")
        gone = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(service._place(gone, KEYS[GOOD]))
        await until(lambda: service.turns.waiting == 1)
        service.turns.leave("other")
        for _ in range(steps):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        for _ in range(3):
            await asyncio.sleep(0)
        assert service.turns.answering == (0 if waiting.cancelled() else 1)

    with closing(one_at_a_time(FakeChat())) as setting:
        asyncio.run(run(setting.app.state.service))
