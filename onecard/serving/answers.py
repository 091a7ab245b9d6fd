"""Answers of one request: computed in a thread by Chat.stream, read in the event loop as they grow.

Prompts are counted before the first byte goes out. Chat.stream leaves out old turns where a chat is too long;
here such a request is refused with the counts, and nothing is left out.
"""

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import NamedTuple

from onecard.config.generation import Generation
from onecard.data.conversation import Conversation
from onecard.errors import UserError, is_out_of_memory
from onecard.inference.controls import NONE as NO_CONTROLS
from onecard.inference.controls import Controls
from onecard.inference.decoding import CANCELLED, NO_MEMORY
from onecard.inference.logprobs import TokenChoice
from onecard.serving import refusals
from onecard.serving.models import Served
from onecard.serving.refusals import BAD_REQUEST, RequestError


class Question(NamedTuple):
    """One answer that is to be computed."""

    conversation: Conversation
    settings: Generation
    prompt_tokens: int


class Piece(NamedTuple):
    """Text that a choice has grown by."""

    choice: int
    text: str
    logprobs: tuple[TokenChoice, ...] = ()  # of further tokens; empty unless they were asked for


class Ended(NamedTuple):
    """A choice that is complete."""

    choice: int
    reason: str  # "stop" or "length"
    tokens: int  # of the answer, without EOS


class Choice(NamedTuple):
    """A whole answer."""

    text: str
    logprobs: list[TokenChoice]
    end: Ended


@dataclasses.dataclass
class Usage:
    """Tokens of a request so far."""

    prompt: int = 0
    completion: int = 0


class Task(NamedTuple):
    """What a request asks for."""

    served: Served
    conversations: list[Conversation]
    settings: Generation
    most_tokens: int | None = None  # of an answer; None: as many as fit
    choices: int = 1  # answers to each conversation
    controls: Controls = NO_CONTROLS


def questions(task: Task) -> list[Question]:
    """The answers to compute, each with a seed of its own.

    Raises RequestError with the counts when a prompt and its answer do not fit into the context. It
    tokenises, so it belongs into a thread.
    """
    served, settings, most_tokens = task.served, task.settings, task.most_tokens
    chat = served.chat
    if not chat.engine.is_loaded:
        try:
            chat.engine.load()
        except UserError as error:
            raise refusals.no_model() from error
    result: list[Question] = []
    try:
        chat.check(settings, task.controls, served.template_name)
    except UserError as error:  # the other values have been checked by the request
        param = "logit_bias" if task.controls.json_schema is None else "response_format"
        raise RequestError(BAD_REQUEST, error.problem, param, "invalid_parameter") from None
    for conversation in task.conversations:
        count = count_tokens(served, conversation)
        room = chat.engine.context - count
        if room < max(1, most_tokens or 1):
            asked = f" and {most_tokens} for the answer" if most_tokens else ""
            message = (
                f"The context of this model has {chat.engine.context} tokens, but the request has {count} "
                f"in the prompt{asked}. Shorten it."
            )
            raise RequestError(BAD_REQUEST, message, "messages", "context_length_exceeded")
        for _ in range(task.choices):
            number = len(result)
            seed = None if settings.seed is None else (settings.seed + number) % 2**63
            own = dataclasses.replace(
                settings, seed=seed, max_new_tokens=min(most_tokens or settings.max_new_tokens, room)
            )
            result.append(Question(conversation, own, count))
    return result


def count_tokens(served: Served, conversation: Conversation) -> int:
    """Tokens of a conversation in its template; raises RequestError when the template cannot write it."""
    try:
        return served.chat.prompt_tokens(conversation, served.template_name)
    except UserError as error:
        raise RequestError(BAD_REQUEST, error.problem, "messages", "invalid_prompt") from None


class Answering:
    """The answers to some questions, one after the other, computed in a thread."""

    def __init__(self, task: Task, asked: list[Question], log_failure: Callable[[BaseException], None]):
        """log_failure: is called in the thread with an error that is not the caller's."""
        self.served, self.controls = task.served, task.controls
        self.asked, self.log_failure = asked, log_failure
        self.usage = Usage(prompt=sum(question.prompt_tokens for question in asked))
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[Piece | Ended | RequestError | None] = asyncio.Queue()
        self.is_cancelled = threading.Event()
        self.why: RequestError | None = None

    def start(self, executor: Executor, done: Callable[[], None]) -> None:
        """Begin; `done` is called in the event loop when nothing more is computed."""
        executor.submit(self._compute, done)

    def cancel(self, why: RequestError | None = None) -> None:
        """Ask for no further token; a reader of `read` gets `why`."""
        self.why = self.why or why
        self.is_cancelled.set()

    async def read(self, patience: float) -> AsyncIterator[Piece | Ended | None]:
        """What happens; None when nothing has for `patience` seconds. Raises RequestError."""
        while True:
            try:
                event = await asyncio.wait_for(self.events.get(), patience)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, RequestError):
                raise event
            if event is None:
                return
            yield event

    def _compute(self, done: Callable[[], None]) -> None:
        end: RequestError | None = None
        try:
            for choice, question in enumerate(self.asked):
                self._answer(choice, question)
        except RequestError as error:
            end = error
        except UserError as error:  # not the caller's: its request was checked before
            end = refusals.no_model()
            self.log_failure(error)
        except BaseException as error:
            end = refusals.no_room() if is_out_of_memory(error) else refusals.failed()
            self.log_failure(error)
        self._in_loop(done)  # before the end is read, which may be the last thing that the loop does
        self._tell(end)

    def _answer(self, choice: int, question: Question) -> None:
        length, scored, before = 0, 0, self.usage.completion
        stream = self.served.chat.stream(
            question.conversation,
            question.settings,
            self.served.active_adapters,
            self.is_cancelled.is_set,
            self.served.template_name,
            self.controls,
        )
        with contextlib.closing(stream):
            for reply in stream:
                assert not reply.left_out, "the prompt was counted before"
                self.usage.completion = before + reply.completion_tokens
                if reply.finished == NO_MEMORY:
                    raise refusals.no_room()
                if reply.finished == CANCELLED:
                    raise self.why or refusals.cancelled()
                text, choices = reply.text.stable[length:], (reply.logprobs or ())[scored:]
                length, scored = length + len(text), scored + len(choices)
                if text or choices:
                    self._tell(Piece(choice, text, choices))
                if reply.finished:
                    assert reply.finish_reason, "cancelled and out of memory are handled above"
                    self._tell(Ended(choice, reply.finish_reason, reply.completion_tokens))
        if self.is_cancelled.is_set() and choice + 1 < len(self.asked):
            raise self.why or refusals.cancelled()

    def _tell(self, event: Piece | Ended | RequestError | None) -> None:
        self._in_loop(self.events.put_nowait, event)

    def _in_loop(self, call: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads any more
            self.loop.call_soon_threadsafe(call, *arguments)
