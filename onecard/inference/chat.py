"""A conversation in, a stream of text out, from any engine; prompts are encoded as in training."""

import dataclasses
import threading
import time
from collections.abc import Callable, Generator

import torch
from transformers import PreTrainedTokenizerBase

from onecard.config import chat as config_chat
from onecard.config import generation
from onecard.config.chat import ChatConfig
from onecard.config.generation import TRAINED, ActiveAdapters, Generation
from onecard.data import encode as data_encode
from onecard.data import template as data_template
from onecard.data.conversation import Conversation
from onecard.data.template import Template
from onecard.errors import UserError, is_out_of_memory
from onecard.inference import controls as inference_controls
from onecard.inference import decoding, detokenizer, history, lazy_engine, loader, transformers_engine
from onecard.inference import engine as inference_engine
from onecard.inference.controls import Controls
from onecard.inference.decoding import CANCELLED, END, LENGTH, NO_MEMORY, STOP
from onecard.inference.grammar import Vocabulary
from onecard.inference.logprobs import Record, TokenChoice
from onecard.inference.rules import AnswerRule
from onecard.system.console import say

FINISH_REASONS = {END: "stop", STOP: "stop", LENGTH: "length"}  # why an answer is finished, in OpenAI's words
ANY_LENGTH = 1 << 62  # room for a prompt that is only counted


def reply(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    conversations: list[Conversation],
    max_new_tokens: int,
) -> list[str]:
    """One greedy answer to each conversation; an answer at the end of a conversation is left out first."""
    prompts = [data_encode.encode(c.question, template, tokenizer)[0] for c in conversations]
    answers = transformers_engine.greedy(
        model, prompts, max_new_tokens, data_encode.eos_ids(template, tokenizer)
    )
    return [data_encode.decode(tokenizer, ids) for ids in answers]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A growing answer, and what it has taken so far."""

    text: detokenizer.PartialText
    prompt_tokens: int  # with those of an answer that is continued
    read: int  # tokens of the prompt that have been read so far
    reused: int  # tokens of the prompt that were read for the turn before
    left_out: int  # earlier questions that did not fit
    seconds: float  # since the question
    first: float | None  # seconds until the first token
    seed: int | None = None  # of a sampled answer; the same seed gives the same answer again
    loading: bool = False  # whether the model is still being loaded
    logprobs: tuple[TokenChoice, ...] | None = None  # of the tokens whose text stays; None: not asked for
    ended: str = ""  # why it had to be loaded again for this answer

    @property
    def finished(self) -> str:
        return self.text.finished

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words; None while the answer grows, and when it was cancelled or memory ran out."""
        return FINISH_REASONS.get(self.finished)

    @property
    def completion_tokens(self) -> int:
        """Tokens that the model has added, with those of a stop word and without an EOS id."""
        return self.text.tokens

    @property
    def speed(self) -> float:
        """Tokens per second, without the time that reading the prompt took."""
        if self.first is None or self.text.tokens < 2:
            return 0.0
        return (self.text.tokens - 1) / max(self.seconds - self.first, 1e-9)


def start(options: ChatConfig, to_gguf: loader.ToGguf, sequences: int = 1) -> "Chat":
    """A model that is ready to talk, by these options; to_gguf and sequences: as loader.load takes them."""
    return Chat(*loader.load(options, to_gguf, sequences=sequences))


def with_its_mode(talk: "Chat", options: ChatConfig, explicit: frozenset[str]) -> ChatConfig:
    """The options with a mode that the engine has.

    explicit: names of the options that the user gave; a mode among them stays.
    """
    if "mode" in explicit or options.mode in talk.modes():
        return options
    return dataclasses.replace(options, mode=generation.SAMPLE)


def later(options: ChatConfig, to_gguf: loader.ToGguf, beside: Callable[[str], list[str]]) -> "Chat":
    """The same, but the first question loads the weights; beside: as lazy_engine.Engine takes it."""
    plan = loader.prepare(options)

    def load() -> (
        inference_engine.Engine
    ):  # by then a run may have newer checkpoints, and the older ones no more
        return loader.engine_of(loader.prepare(options), to_gguf)

    engine = lazy_engine.Engine(plan, load, beside)
    say("model       not loaded: the first question does that")
    chat = Chat(*loader.loaded(plan, engine))
    plan.model.close()
    return chat


class Chat:
    """A model that is ready to talk: an engine, a template, adapters. The caller keeps the conversations."""

    def __init__(
        self,
        engine: inference_engine.Engine,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        active_adapters: ActiveAdapters = (),
        versions: dict[str, str] | None = None,
    ):
        """active_adapters: those that answer unless a question names others.

        versions: owner/name@COMMIT of the base and of adapters, where they come from the hub.
        """
        self.versions = versions or {}
        self.engine, self.template, self.active_adapters = engine, template, active_adapters
        self.models_tokenizer = tokenizer  # the one that every template starts from
        self.tokenizer = data_template.tokenizer_for(tokenizer, template)
        self.eos_ids = data_encode.eos_ids(template, tokenizer)
        self.others: dict[str, tuple[Template, PreTrainedTokenizerBase]] = {}  # by their names
        self.vocabularies: dict[str, Vocabulary] = {}  # by the names of templates
        self.lock = threading.Lock()  # of `others` and `vocabularies`

    def unused(self, mode: str) -> dict[str, tuple[str, str]]:
        """Option -> why it does nothing with this mode and engine, in English and Chinese."""
        return config_chat.unused(mode) | self._lacking()

    def _lacking(self) -> dict[str, tuple[str, str]]:
        return config_chat.unused_by(self.engine.name, self.engine.capabilities.lacks)

    def template_of(self, name: str = TRAINED) -> Template:
        """The template of this name; TRAINED is the one that the chat was made with. Raises UserError."""
        return self._template(name)[0]

    def prompt_tokens(self, conversation: Conversation, template_name: str = TRAINED) -> int:
        """Tokens of the whole conversation in its template; raises UserError when it cannot be written."""
        template, tokenizer = self._template(template_name)
        return len(history.fit(conversation, template, tokenizer, ANY_LENGTH).ids)

    def _template(self, name: str) -> tuple[Template, PreTrainedTokenizerBase]:
        """A template and its tokenizer: a control token of one template is ordinary text in another."""
        if name == TRAINED:
            return self.template, self.tokenizer
        if name not in data_template.names():  # a page could send the name of any file
            raise UserError(
                f"No template is called {name}.", f"Choose from: {', '.join(data_template.names())}."
            )
        with self.lock:
            if name not in self.others:
                template = data_template.load(name, self.models_tokenizer)
                self.others[name] = template, data_template.tokenizer_for(self.models_tokenizer, template)
            return self.others[name]

    def modes(self) -> list[str]:
        return [mode for mode in generation.MODES if mode not in self.engine.capabilities.lacks]

    def check_mode(self, mode: str) -> None:
        """Raise UserError with the reason when the engine lacks this mode."""
        lacking = self._lacking()
        if mode in lacking:
            raise UserError(f"--mode {mode}: {lacking[mode][0]}.", "Choose another mode.")

    def check(
        self, settings: Generation, controls: Controls = inference_controls.NONE, template_name: str = TRAINED
    ) -> None:
        """Raise UserError with the reason when an answer cannot be asked for like this; reads no weights."""
        self._check_values(settings, controls, template_name)
        self._rules(controls, [], template_name)

    def _check_values(self, settings: Generation, controls: Controls, template_name: str) -> None:
        """What `check` does, but for the grammar, which takes some milliseconds."""
        self.check_mode(settings.mode)
        controls.check(settings, len(self._template(template_name)[1]))

    def _rules(self, controls: Controls, before: list[int], template_name: str) -> list[AnswerRule]:
        """The rules of one answer; before: the tokens of the answer that is continued. Raises UserError."""
        rules = controls.rules_after(before)
        if controls.json_schema is not None:
            rules.append(self._vocabulary(template_name).grammar(controls.json_schema, before))
        return rules

    def _vocabulary(self, template_name: str) -> Vocabulary:
        template, tokenizer = self._template(template_name)
        with self.lock:
            if template_name not in self.vocabularies:
                eos_ids = data_encode.eos_ids(template, tokenizer)
                self.vocabularies[template_name] = Vocabulary(tokenizer, eos_ids)
            return self.vocabularies[template_name]

    def stream(
        self,
        conversation: Conversation,
        settings: Generation,
        active_adapters: ActiveAdapters | None = None,
        cancelled: Callable[[], bool] = lambda: False,
        template_name: str = TRAINED,
        controls: Controls = inference_controls.NONE,
    ) -> Generator[Reply, None, None]:
        """The growing answer; the last Reply has `finished`. An answer at the end is continued.

        cancelled: is called after every token; template_name: as template_of takes it. An answer that is
        cancelled, or runs out of memory, keeps the text that it has. Raises UserError when the question does
        not fit into the context, or as `check` does.
        """
        started = time.monotonic()
        settings = generation.seeded(settings)
        ended = ""
        if not self.engine.is_loaded:
            ended = self.engine.why_ended()
            yield Reply(detokenizer.PartialText(""), 0, 0, 0, 0, 0.0, None, loading=True, ended=ended)
            self.engine.load()
            started = time.monotonic()
        active_adapters = self.active_adapters if active_adapters is None else active_adapters
        self._check_values(settings, controls, template_name)
        self.engine.check_active_adapters(active_adapters)
        template, tokenizer = self._template(template_name)
        eos_ids = self.eos_ids if template_name == TRAINED else data_encode.eos_ids(template, tokenizer)
        without_limit = settings.max_new_tokens == generation.NO_LIMIT
        answer_room = 1 if without_limit else min(settings.max_new_tokens, self.engine.context // 2)
        room = self.engine.context - answer_room
        fitted = history.fit(
            conversation, template, tokenizer, room, settings.max_memory, settings.last_turns
        )
        stops, banned = controls.stops(settings), generation.phrases(settings.banned)
        growing = detokenizer.beginning(tokenizer, fitted.answer, stops)
        rules = self._rules(controls, fitted.answer, template_name)
        record = None
        if controls.top_logprobs is not None:
            record = Record(tokenizer, stops, fitted.answer)
        first, seed = None, settings.seed if settings.samples else None
        read = 0

        def so_far(text: detokenizer.PartialText, finished: str = "") -> Reply:
            text = dataclasses.replace(text, finished=finished) if finished else text
            taken = time.monotonic() - started
            counts = len(fitted.ids), read, sequence.reused, fitted.left_out
            logprobs = record.settled(text.finished) if record else None
            return Reply(text, *counts, taken, first, seed, logprobs=logprobs, ended=ended)

        sequence = self.engine.open(fitted.ids, active_adapters)
        try:
            for read in sequence.read():
                if cancelled():
                    sequence.cancel()
                    yield so_far(_settled(growing), CANCELLED)
                    return
                if read < len(fitted.ids):
                    yield so_far(growing)
            limit = min(settings.max_new_tokens, self.engine.context - len(fitted.ids))
            watch = detokenizer.watch(tokenizer, stops, banned, fitted.answer)
            steps = decoding.decode(
                sequence, fitted.ids, settings, eos_ids, limit, watch, rules, controls.top_logprobs
            )
            if record:
                steps = record.of(steps)
            for growing in detokenizer.grow(tokenizer, steps, stops, fitted.answer):
                first = first or time.monotonic() - started
                if cancelled() and not growing.finished:
                    sequence.cancel()
                    yield so_far(_settled(growing), CANCELLED)
                    return
                yield so_far(growing)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the tensors that filled the memory
            self.engine.forget()
            yield so_far(_settled(growing), NO_MEMORY)
        finally:
            sequence.close()


def _settled(text: detokenizer.PartialText) -> detokenizer.PartialText:
    """The text when nothing more comes; what might have become a stop word is shown too."""
    return dataclasses.replace(text, stable=text.beams[0], open="")
