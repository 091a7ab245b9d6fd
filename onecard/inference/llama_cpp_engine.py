"""Text generation by llama.cpp on the CPU: token ids in, scores of the next token out.

llama.cpp runs in a child process (llama_cpp_process.py). When it ends, the answers in progress end with one
message each, and the next question starts it again. This file knows no conversation and no template, and
decoding.py chooses the tokens for all engines. Prompts are encoded by the tokenizer of transformers, so they
are the same as in training. The context holds as many sequences as the caller says, usually one; a further
question waits until an answer has ended. Sequences of one mixture of adapters are computed together
(batching.py); llama_cpp_context.py keeps account of what each holds.

Legend: V entries of the vocabulary.
"""

import dataclasses
import itertools
import threading
from collections import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from onecard.config.chat import ONE_SEQUENCE
from onecard.config.generation import BEAM, BEAM_SAMPLE, ActiveAdapters
from onecard.errors import CHECKPOINT, UserError
from onecard.inference import engine as inference_engine
from onecard.inference import gguf_check
from onecard.inference import slots as inference_slots
from onecard.inference.batching import Batching, Step
from onecard.inference.llama_cpp_context import Context
from onecard.inference.llama_cpp_model import CHUNK
from onecard.inference.llama_cpp_process import ModelProcess
from onecard.inference.llama_cpp_restarts import Restarts
from onecard.inference.slots import Slot
from onecard.system.console import say

TURN = 0.2  # seconds after which a waiting sequence looks whether it was cancelled


class Engine:
    """A GGUF file with adapters. An answer uses a sequence of its context, from its read() to its close()."""

    name = "llama.cpp"
    capabilities = inference_engine.Capabilities(
        interleaves=False, lacks={BEAM: ONE_SEQUENCE, BEAM_SAMPLE: ONE_SEQUENCE}
    )

    def __init__(
        self,
        gguf: Path,
        tokenizer: Any,
        context: int,
        adapters: Mapping[str, Path] | None = None,
        threads: int | None = None,
        exact: bool = False,
        sequences: int = 1,
    ):
        """context: tokens of prompt and answer together, at most what the model was trained for; adapters:
        name -> GGUF adapter; threads: of the CPU, as many as torch uses if None; exact: keeps keys and values
        in fp32, to compare results. In fp16, the usual choice of llama.cpp, they are smaller and faster.
        sequences: answers in progress at the same time; each has room for `context` tokens.

        It is loaded at once. Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it
        needs too much memory.
        """
        assert 1 <= sequences <= CHUNK, sequences
        self.path, self.tokenizer, self.longest, self.exact = gguf, tokenizer, context, exact
        self.files, self.sequences = dict(adapters or {}), sequences
        self.adapters, self.threads = list(self.files), threads or torch.get_num_threads()
        if sequences > 1:
            self.capabilities = inference_engine.Capabilities(
                interleaves=True, lacks=Engine.capabilities.lacks
            )
        self.batching = Batching(CHUNK)
        self.loading = threading.Lock()
        self.restarts = Restarts(gguf)
        self.closed = False
        self.closings = itertools.count(1)
        self._start()

    def load(self) -> None:
        """Start llama.cpp again if it has ended; a second caller waits. Raises UserError as the constructor,
        and when it has ended so often that it is not started for some seconds.

        The files are checked anew, as one of them may have become damaged.
        """
        with self.loading:
            self._check_open()
            if not self.is_loaded:
                reason = self.why_ended()
                if reason:  # the caller has not looked, or it has just ended
                    say(f"{reason} The model is loaded again.")
                self.restarts.check()
                self._start()

    def _start(self) -> None:
        gguf_check.check(self.path, list(self.files.values()))
        self.process = ModelProcess(
            self.path, self.longest, self.files, self.threads, self.exact, self.sequences
        )
        self.restarts.started()
        entries, self.context = self.process.entries, self.process.context
        try:
            _check_vocabulary(self.path, entries, self.tokenizer)
        except UserError:
            self.process.close()
            raise
        self.batching.pool = self.memory = Context(self.process, self.sequences)

    @property
    def is_loaded(self) -> bool:
        return self.process.is_alive

    def why_ended(self) -> str:
        ended = self.process.ended_by_itself()
        return ended.problem if ended else ""

    @property
    def placement(self) -> inference_engine.Placement:
        return inference_engine.Placement("cpu", self.threads)

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be active with these weights."""
        for name, _ in active_adapters:
            inference_engine.check_adapter(name, self.adapters)

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> "Sequence":
        self._check_open()
        return Sequence(self, prompt, active_adapters)

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("The engine is closed.")

    def forget(self) -> None:
        """Use nothing again of what the slots hold now. The failed answer may still have its own open."""
        for slot in self.memory.slots:
            slot.is_stale = True

    def take(self, arrival: object, prompt: list[int], active_adapters: ActiveAdapters) -> "Taken | None":
        """A slot that holds the beginning of this prompt, unless all are in use for TURN seconds.

        arrival: what Batching.arrive got. Starts llama.cpp again if it has ended since the last answer.
        """
        if not self.batching.enter(arrival, TURN):
            return None
        try:
            self.load()
            context = self.memory
            return Taken(context, context.open(prompt, inference_slots.mixture_of(active_adapters)))
        finally:
            self.batching.leave()

    def add(self, taken: "Taken", ids: list[int], rows: torch.Tensor | None, each: bool = False) -> int:
        """Add ids, which are at most CHUNK, to a slot; returns how many were added, at least one.

        rows: receives the scores: [1, V], after the last of the ids if all were added; each: [len(ids), V],
        after each that was added.
        """
        room = memoryview(b"") if rows is None else _bytes_of(rows)
        return self.batching.step(Step(taken.context, taken.slot, ids, room, each))

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> Iterator[torch.Tensor]:
        """Scores [t, V] of the token after each of `ids`, some tokens at a time; `ids` begin the sequence."""
        self._check_open()
        sequence = Sequence(self, [], active_adapters)
        try:
            for _ in sequence.read():
                pass
            start = 0
            while start < len(ids):
                part = ids[start : start + CHUNK]
                rows = torch.empty(len(part), self.process.entries)
                count = self.add(sequence.opened(), part, rows, each=True)
                start += count
                yield rows[:count]
        finally:
            sequence.close()

    def encode(self, text: str) -> list[int]:
        """Ids of a text by the vocabulary in the file, without BOS; names of added tokens become tokens."""
        return self.process.encode(text)

    def ends_with(self, token: int) -> bool:
        """Whether this token ends an answer in llama.cpp."""
        return self.process.ends_with(token)

    def written(self, key: str) -> str | None:
        """An entry of the metadata in the file, as text; None when there is no such key."""
        return self.process.written(key)

    def close(self) -> None:
        """Free the memory as soon as no answer is in progress."""
        self.batching.wait_until_unused()
        try:
            with self.loading:
                self.closed = True
                self.process.close()
        finally:
            self.batching.leave()


@dataclasses.dataclass(frozen=True)
class Taken:
    """A slot that an answer uses, in the context that it was opened in."""

    context: Context
    slot: Slot


class Sequence:
    """One answer's use of the engine: an engine.Sequence."""

    def __init__(self, engine: Engine, prompt: list[int], active_adapters: ActiveAdapters):
        self.engine, self.prompt, self.active_adapters = engine, prompt, active_adapters
        self.reused = 0
        self.cancelled = False
        self.taken: Taken | None = None
        self.was_read = False

    def read(self) -> Iterator[int]:
        """Read the prompt; yields how many tokens have been read, 0 while it waits for an answer to end."""
        self.engine.batching.arrive(self)
        try:
            while (taken := self.engine.take(self, self.prompt, self.active_adapters)) is None:
                if self.cancelled:
                    return
                yield 0
        finally:
            self.engine.batching.give_up(self)
        self.taken = taken
        place = self.reused = len(taken.slot.ids)
        while place < len(self.prompt):
            if self.cancelled:
                return
            part = self.prompt[place : place + CHUNK]
            is_last = place + len(part) == len(self.prompt)
            place += self.engine.add(taken, part, self._row(taken) if is_last else None)
            yield place
        self.was_read = True

    def first(self) -> torch.Tensor:
        taken = self.opened()
        assert self.was_read, "read() comes first"
        return self._row(taken)

    def advance(self, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> torch.Tensor:
        taken = self.opened()
        assert list(parents) == [0], "this engine follows one sequence"
        self.engine.add(taken, list(tokens), self._row(taken))
        return self._row(taken)

    def _row(self, taken: Taken) -> torch.Tensor:
        return taken.context.rows[taken.slot.number]

    def opened(self) -> Taken:
        """Where the sequence is; raises RuntimeError when it goes on no more."""
        if self.cancelled or self.taken is None:
            raise RuntimeError("The sequence was cancelled, closed or never read.")
        return self.taken

    def cancel(self) -> None:
        self.cancelled = True
        if self.taken is not None:
            self.engine.batching.withdraw(self.taken.slot, RuntimeError("The sequence was cancelled."))

    def close(self) -> None:
        """Let another answer begin. Keys and values stay, for the next turn of this conversation."""
        taken, self.taken = self.taken, None
        if taken is not None:
            self.engine.batching.close(taken.slot, next(self.engine.closings))


def _is_an_engine(engine: Engine) -> inference_engine.Engine:
    """For the type checker alone."""
    return engine


def _bytes_of(rows: torch.Tensor) -> memoryview:
    """The memory of a tensor on the CPU."""
    return rows.numpy().data.cast("B")


def _check_vocabulary(gguf: Path, entries: int, tokenizer: Any) -> None:
    # special tokens do not count, because transformers adds one of its own when it reads a GGUF file
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max(token for token in tokenizer.get_vocab().values() if token not in special)
    if highest >= entries:
        problem = f"{gguf}: the file has {entries} tokens, but the ids of the tokenizer go up to {highest}."
        raise UserError(problem, "Use the tokenizer and the GGUF file of one model.", CHECKPOINT)
