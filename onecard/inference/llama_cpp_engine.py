"""Text generation by llama.cpp on the CPU: token ids in, scores of the next token out.

llama.cpp runs in a child process (llama_cpp_process.py). When it ends, the answer in progress ends with one
message, and the next question starts it again. This file knows no conversation and no template, and
decoding.py chooses the tokens for all engines. Prompts are encoded by the tokenizer of transformers, so they
are the same as in training. The context holds one sequence; a second question waits for the first answer.

Legend: V entries of the vocabulary.
"""

import threading
from collections import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from onecard.config.chat import ONE_SEQUENCE
from onecard.config.generation import BEAM, BEAM_SAMPLE, ActiveAdapters
from onecard.errors import CHECKPOINT, UserError
from onecard.inference import engine as inference_engine
from onecard.inference import gguf_check
from onecard.inference.decoding import shared_beginning
from onecard.inference.llama_cpp_model import CHUNK
from onecard.inference.llama_cpp_process import ModelProcess
from onecard.system.console import say

TURN = 0.2  # seconds after which a waiting sequence looks whether it was cancelled


class Engine:
    """A GGUF file with adapters. One answer at a time uses it, from its read() to its close()."""

    name = "llama.cpp"
    capabilities: ClassVar = inference_engine.Capabilities(
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
    ):
        """context: tokens of prompt and answer together, at most what the model was trained for; adapters:
        name -> GGUF adapter; threads: of the CPU, as many as torch uses if None; exact: keeps keys and values
        in fp32, to compare results. In fp16, the usual choice of llama.cpp, they are smaller and faster.

        It is loaded at once. Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it
        needs too much memory.
        """
        self.path, self.tokenizer, self.longest, self.exact = gguf, tokenizer, context, exact
        self.files = dict(adapters or {})
        self.adapters, self.threads = list(self.files), threads or torch.get_num_threads()
        self.lock = threading.Lock()  # held for a whole answer, not only for a step
        self.loading = threading.Lock()
        self.closed = False
        self._start()

    def load(self) -> None:
        """Start llama.cpp again if it has ended; a second caller waits. Raises UserError as the constructor.

        The files are checked anew, as one of them may have become damaged.
        """
        with self.loading:
            self._check_open()
            if not self.is_loaded:
                reason = self.why_ended()
                if reason:  # the caller has not looked, or it has just ended
                    say(f"{reason} The model is loaded again.")
                self._start()

    def _start(self) -> None:
        gguf_check.check(self.path, list(self.files.values()))
        self.process = ModelProcess(self.path, self.longest, self.files, self.threads, self.exact)
        entries, self.context = self.process.entries, self.process.context
        try:
            _check_vocabulary(self.path, entries, self.tokenizer)
        except UserError:
            self.process.close()
            raise
        self.context_ids: list[int] = []  # tokens whose keys and values are in the context
        self.active: dict[str, float] = {}
        self.stale = False  # whether a step failed, so that the context is in no known state
        self.row = torch.empty(1, entries)  # every step writes its scores here
        self.room = _bytes_of(self.row)

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
        """Start the next answer with an empty context. Takes no lock, as the failed answer still holds it."""
        self.stale = True

    def begin(self, prompt: list[int], active_adapters: ActiveAdapters) -> int:
        """Cut the context to the tokens that this prompt begins with; returns how many they are.

        At least one token of the prompt is left to be read, since its scores are needed.
        """
        self.load()  # llama.cpp may have ended since the last answer
        active = {name: weight for name, weight in active_adapters if weight}
        keep = 0
        if active == self.active and not self.stale:
            keep = shared_beginning(self.context_ids, prompt[:-1])
        if active != self.active:
            self._activate(active)
        if keep < len(self.context_ids) or self.stale:
            keep = self.process.cut(keep)
        self.context_ids, self.stale = self.context_ids[:keep], False
        return keep

    def _activate(self, active: dict[str, float]) -> None:
        self.process.activate(active)
        self.active = active

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> Iterator[torch.Tensor]:
        """Scores [t, V] of the token after each of `ids`, some tokens at a time; `ids` begin the sequence."""
        with self.lock:
            self.begin([], active_adapters)
            for start in range(0, len(ids), CHUNK):
                part = ids[start : start + CHUNK]
                rows = torch.empty(len(part), self.process.entries)
                self._step(part, _bytes_of(rows), each=True)
                yield rows

    def scores(self, ids: list[int]) -> torch.Tensor:
        """Scores [1, V] of the token after `ids`, which are at most CHUNK and are added to the context.

        It is the same tensor every time; the next call overwrites it.
        """
        self._step(ids, self.room)
        return self.row

    def _step(self, ids: list[int], room: memoryview, each: bool = False) -> None:
        try:
            self.process.scores(ids, room, each)
        except (MemoryError, RuntimeError):
            self.stale = True
            raise
        self.context_ids += ids

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
        with self.lock, self.loading:
            self.closed = True
            self.process.close()


class Sequence:
    """One answer's use of the engine: an engine.Sequence."""

    def __init__(self, engine: Engine, prompt: list[int], active_adapters: ActiveAdapters):
        self.engine, self.prompt, self.active_adapters = engine, prompt, active_adapters
        self.reused = 0
        self.has_lock = self.cancelled = False
        self.scores: torch.Tensor | None = None

    def read(self) -> Iterator[int]:
        """Read the prompt; yields how many tokens have been read, 0 while another answer is in progress."""
        while not self.engine.lock.acquire(timeout=TURN):
            if self.cancelled:
                return
            yield 0
        self.has_lock = True
        self.reused = self.engine.begin(self.prompt, self.active_adapters)
        for start in range(self.reused, len(self.prompt), CHUNK):
            if self.cancelled:
                return
            part = self.prompt[start : start + CHUNK]
            self.scores = self.engine.scores(part)
            yield start + len(part)

    def first(self) -> torch.Tensor:
        self._check_goes_on()
        assert self.scores is not None, "read() comes first"
        return self.scores

    def advance(self, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> torch.Tensor:
        self._check_goes_on()
        assert list(parents) == [0], "this engine follows one sequence"
        return self.engine.scores(list(tokens))

    def cancel(self) -> None:
        self.cancelled = True

    def _check_goes_on(self) -> None:
        if self.cancelled or not self.has_lock:
            raise RuntimeError("The sequence was cancelled, closed or never read.")

    def close(self) -> None:
        """Let the next answer begin. Keys and values stay, for the next turn of this conversation."""
        if self.has_lock:
            self.has_lock = False
            self.engine.lock.release()


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
