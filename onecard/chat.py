"""Conversation in, stream of text out, whichever engine answers. The same `prompt.encode` as in training."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

from onecard import answer, chat_config, decoding, engine_hf, history, loading, prompt
from onecard.chat_config import ChatConfig, Generation, Mixture
from onecard.decoding import CANCELLED, NO_MEMORY
from onecard.errors import UserError, is_out_of_memory
from onecard.prompt import Conversation, Template


def reply(
    model: Any, tokenizer: Any, template: Template, conversations: list[Conversation], max_new_tokens: int
) -> list[str]:
    """One greedy answer for each conversation; an answer it may end with is not looked at."""
    prompts = [prompt.encode(c.question, template, tokenizer)[0] for c in conversations]
    answers = engine_hf.greedy(model, prompts, max_new_tokens, prompt.ends(template, tokenizer))
    return [prompt.decode(tokenizer, ids) for ids in answers]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A growing answer and what it took so far."""

    text: answer.Text
    prompt_tokens: int
    read: int  # of them; fewer than prompt_tokens while the prompt is still being read
    reused: int  # of them, from the turn before
    left_out: int  # earlier questions that did not fit
    seconds: float  # since the question
    first: float | None  # of them until the first token

    @property
    def finished(self) -> str:
        return self.text.finished

    @property
    def speed(self) -> float:
        """Tokens a second, the reading of the prompt apart."""
        if self.first is None or self.text.tokens < 2:
            return 0.0
        return (self.text.tokens - 1) / max(self.seconds - self.first, 1e-9)


def start(options: ChatConfig, *how: Any) -> "Chat":
    """A model ready to talk, as the options say; how: what loading.load takes besides."""
    return Chat(*loading.load(options, *how))


def with_its_mode(talk: "Chat", options: ChatConfig, given: frozenset[str]) -> ChatConfig:
    """The options with a mode that the engine has, unless one was asked for (which is then refused)."""
    if "mode" in given or options.mode in talk.modes():
        return options
    return dataclasses.replace(options, mode=chat_config.SAMPLE)


class Chat:
    """A model ready to talk: an engine, a template, adapters. Conversations are the caller's."""

    def __init__(self, engine: Any, template: Template, mixture: Mixture = ()):
        """mixture: adapters and weights that answer unless a question says otherwise."""
        self.engine, self.tokenizer, self.template, self.mixture = engine, engine.tokenizer, template, mixture
        self.ends = prompt.ends(template, engine.tokenizer)

    def unused(self, mode: str) -> dict[str, tuple[str, str]]:
        """Option -> why it does nothing with this mode and engine, English and Chinese."""
        return chat_config.unused(mode) | self.engine.cannot

    def modes(self) -> list[str]:
        return [mode for mode in chat_config.MODES if mode not in self.engine.cannot]

    def stream(
        self,
        conversation: Conversation,
        settings: Generation,
        mixture: Mixture | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Reply]:
        """The answer as it grows; the last one has `finished`. An answer at the end is continued.

        cancelled: asked after every token. Out of memory and cancelling keep what is there. Raises UserError
        when the question does not fit, or the settings ask for what the engine has not.
        """
        started = time.monotonic()
        mixture = self.mixture if mixture is None else mixture
        if settings.mode in self.engine.cannot:
            raise UserError(f"--mode {settings.mode}: {self.engine.cannot[settings.mode][0]}.")
        self.engine.check_mixture(mixture)
        room = self.engine.context - min(settings.max_new_tokens, self.engine.context // 2)
        fitted = history.fit(
            conversation, self.template, self.tokenizer, room, settings.max_memory, settings.last_turns
        )
        stops, banned = chat_config.phrases(settings.stop), chat_config.phrases(settings.banned)
        growing = answer.beginning(self.tokenizer, fitted.answer, stops)
        first = None
        read = 0

        def so_far(text: answer.Text, finished: str = "") -> Reply:
            text = dataclasses.replace(text, finished=finished) if finished else text
            taken = time.monotonic() - started
            return Reply(text, len(fitted.ids), read, stream.reused, fitted.left_out, taken, first)

        stream = self.engine.open(fitted.ids, mixture)
        try:
            for read in stream.read():
                if cancelled():
                    yield so_far(_settled(growing), CANCELLED)
                    return
                if read < len(fitted.ids):
                    yield so_far(growing)
            limit = min(settings.max_new_tokens, self.engine.context - len(fitted.ids))
            watch = answer.watch(self.tokenizer, stops, banned, fitted.answer)
            steps = decoding.decode(stream, fitted.ids, settings, self.ends, limit, watch)
            for growing in answer.grow(self.tokenizer, steps, stops, fitted.answer):
                first = first or time.monotonic() - started
                if cancelled() and not growing.finished:
                    yield so_far(_settled(growing), CANCELLED)
                    return
                yield so_far(growing)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what filled the memory
            self.engine.forget()
            yield so_far(_settled(growing), NO_MEMORY)
        finally:
            stream.close()


def _settled(text: answer.Text) -> answer.Text:
    """What is shown when nothing more comes: what was held back, too."""
    return dataclasses.replace(text, stable=text.beams[0], open="")
