"""What the routes share: models, the queue, the threads that answer, and the stop of the server."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request

from onecard.serving import answers, refusals, request_log
from onecard.serving.answers import Answering, Choice, Ended, Piece, Task
from onecard.serving.keys import Key
from onecard.serving.models import Models
from onecard.serving.request_log import Metrics
from onecard.serving.turns import Turns

KEEP_ALIVE = 10.0  # seconds without a token after which a stream gets a comment


@dataclasses.dataclass(frozen=True)
class Limits:
    """How much the service does at once, and how long it waits."""

    at_once: int = 4  # requests that are answered at the same time
    most_waiting: int = 32  # requests in the queue
    keep_alive: float = KEEP_ALIVE


class Service:
    """One per server; all but the computing happens in the event loop of the server."""

    def __init__(self, models: Models, limits: Limits, log_prompts: bool, write: request_log.Write):
        self.models, self.limits, self.log_prompts, self.write = models, limits, log_prompts, write
        self.turns = Turns(limits.at_once, limits.most_waiting)
        self.executor = ThreadPoolExecutor(limits.at_once, thread_name_prefix="answer")
        self.metrics = Metrics(lambda: self.turns.answering, lambda: self.turns.waiting)
        self.answering: set[Answering] = set()
        self.is_stopping = False

    @contextlib.asynccontextmanager
    async def answer(self, request: Request, key: Key, task: Task) -> AsyncIterator[Answering]:
        """Answers that are being computed: all is checked, the queue is behind us, and the caller is watched.

        When the block ends, or the caller leaves, nothing more is computed. Raises RequestError.
        """
        if self.is_stopping:
            raise refusals.stopping()
        self.turns.check(key.id)
        gone = asyncio.ensure_future(_gone(request))
        try:
            asked = await _unless(gone, asyncio.ensure_future(asyncio.to_thread(answers.questions, task)))
            await self._place(gone, key)
            answering = self._start(request, key, task, asked)
            gone.add_done_callback(lambda _: answering.cancel(refusals.left()))
            try:
                yield answering
            finally:
                answering.cancel(refusals.left())
                self._log(request, answering)
        finally:
            gone.cancel()

    async def _place(self, gone: "asyncio.Future[None]", key: Key) -> None:
        """Wait for a place; without one that nobody would give back when the caller leaves."""
        place = asyncio.ensure_future(self.turns.take(key.id))
        try:
            await _unless(gone, place)
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.turns.leave(key.id)
            raise

    def _start(self, request: Request, key: Key, task: Task, asked: list[answers.Question]) -> Answering:
        fields = request.state.log

        def log_failure(error: BaseException) -> None:
            fields.update(request_log.described(error))

        def done() -> None:
            self.answering.discard(answering)
            self.turns.leave(key.id)

        answering = Answering(task, asked, log_failure)
        self.answering.add(answering)
        answering.start(self.executor, done)
        return answering

    def _log(self, request: Request, answering: Answering) -> None:
        request.state.log |= {
            "model": answering.served.name,
            "prompt_tokens": answering.usage.prompt,
            "completion_tokens": answering.usage.completion,
        }
        if self.log_prompts:
            turns = [[turn.text for turn in each.conversation.turns] for each in answering.asked[:1]]
            request.state.log["prompts"] = turns

    async def stop(self, patience: float) -> None:
        """Take no new requests; after `patience` seconds end those that still run with an error."""
        self.is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while self.answering or self.turns.waiting:
                    await asyncio.sleep(0.05)
        self.turns.refuse_waiting()
        for answering in list(self.answering):
            answering.cancel(refusals.stopping())

    def close(self) -> None:
        """Free the threads; nothing can be answered afterwards."""
        self.executor.shutdown(wait=False, cancel_futures=True)


async def collected(answering: Answering) -> list[Choice]:
    """The choices as a whole; raises RequestError."""
    pieces: list[list[Piece]] = [[] for _ in answering.asked]
    ends: list[Ended] = []
    async for event in answering.read(KEEP_ALIVE):
        if isinstance(event, Piece):
            pieces[event.choice].append(event)
        elif isinstance(event, Ended):
            ends.append(event)
    return [
        Choice(
            "".join(piece.text for piece in pieces[end.choice]),
            [each for piece in pieces[end.choice] for each in piece.logprobs],
            end,
        )
        for end in ends
    ]


async def _gone(request: Request) -> None:
    """Wait until the caller has left; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: "asyncio.Future[None]", work: "asyncio.Task[Any]") -> Any:
    """The result of `work`, which is cancelled when the caller leaves first: RequestError then."""
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise refusals.left()
        return work.result()
    finally:
        work.cancel()
