"""Text generation by llama.cpp: token ids in, scores of the next token out. No graphics card, no torch model.

It knows no conversation, no template and nothing of how a token is chosen: decoding.py does that for both
engines. The tokenizer is transformers', so that prompts are those of training. The context holds one
sequence: who asks second waits.

Legend: V entries of the vocabulary.
"""

import collections
import contextlib
import ctypes
import functools
import importlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from onecard import fingerprint
from onecard.chat_config import Mixture
from onecard.decoding import shared_beginning
from onecard.errors import CHECKPOINT, MEMORY, UserError

CHUNK = 256  # tokens of a prompt read at once: between two chunks an answer can be stopped
TURN = 0.2  # seconds between two looks of one who waits
NO_BEAMS = ("llama.cpp follows one sequence: no beam search", "llama.cpp 一次只跟踪一个序列：不支持束搜索")
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
AGAIN = "Convert or download it again."
TRIAL = """import os, sys
from llama_cpp import llama_cpp as library
settings = library.llama_model_default_params()
settings.vocab_only = True
library.llama_model_load_from_file(os.fsencode(sys.argv[1]), settings)
"""
ALLOCATION = ("alloc", "out of memory", "insufficient memory")  # in llama.cpp's own words


class Engine:
    """A GGUF file in memory, with adapters. One answer at a time has it, from Stream.read to Stream.close."""

    name = "llama.cpp"
    cannot: ClassVar[dict[str, tuple[str, str]]] = {"beam": NO_BEAMS, "beam_sample": NO_BEAMS}

    def __init__(
        self,
        gguf: Path,
        tokenizer: Any,
        context: int,
        adapters: Mapping[str, Path] | None = None,
        threads: int | None = None,
        gpu_layers: int = 0,
    ):
        """context: tokens of prompt and answer together, at most what the model was trained for; adapters:
        name -> GGUF adapter; threads: torch's number unless given; gpu_layers: -1 = all.

        Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it needs too much memory.
        """
        self.tokenizer, self.adapters = tokenizer, list(adapters or {})
        self.threads, self.gpu_layers = threads or torch.get_num_threads(), gpu_layers
        self.lock = threading.Lock()  # of the whole sequence, not of a step
        self.held: list[int] = []  # tokens whose keys and values the context has
        self.active: dict[str, float] = {}
        self.stale = False
        self.library = _library()
        with contextlib.ExitStack() as stack:
            self.model = self._load_model(gguf)
            stack.callback(self.library.llama_model_free, self.model)
            vocabulary = self.library.llama_model_get_vocab(self.model)
            self.entries = self.library.llama_vocab_n_tokens(vocabulary)
            _check_vocabulary(gguf, self.entries, tokenizer)
            self.context = min(context, self.library.llama_model_n_ctx_train(self.model))
            self.state = self._make_state(gguf)
            stack.callback(self.library.llama_free, self.state)
            self.loaded = {name: self._load_adapter(path) for name, path in (adapters or {}).items()}
            self.resources = stack.pop_all()

    def _load_model(self, gguf: Path) -> Any:
        _check_magic(gguf)
        _try_out(gguf)
        settings = self.library.llama_model_default_params()
        settings.n_gpu_layers = self.gpu_layers
        with _complaints() as said:
            model = self.library.llama_model_load_from_file(os.fsencode(gguf), settings)
        if not model:
            raise _unusable(gguf, "llama.cpp cannot load it", said, AGAIN)
        return model

    def _make_state(self, gguf: Path) -> Any:
        settings = self.library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.context, CHUNK, CHUNK
        settings.n_threads = settings.n_threads_batch = self.threads
        with _complaints() as said:
            state = self.library.llama_init_from_model(self.model, settings)
        if not state:
            problem = f"llama.cpp has no room for {self.context} tokens"
            raise _unusable(gguf, problem, said, "Try a smaller --context.", MEMORY)
        return state

    def _load_adapter(self, path: Path) -> Any:
        _check_magic(path)
        with _complaints() as said:
            adapter = self.library.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not adapter:  # the model frees those it has
            fix = "Give the --model_path it was made with."
            raise _unusable(path, "the adapter does not fit this base model", said, fix)
        return adapter

    def describe(self) -> str:
        layers = "all layers" if self.gpu_layers < 0 else f"{self.gpu_layers} layers"
        return f"cpu, {self.threads} threads" + (f", {layers} on the card" if self.gpu_layers else "")

    def check_mixture(self, mixture: Mixture) -> None:
        """Raise UserError when these adapters cannot be used so."""
        for name, _ in mixture:
            if name not in self.loaded:
                known = ", ".join(self.adapters) or "none"
                raise UserError(f"No adapter is called {name}.", f"Loaded: {known}.")

    def open(self, prompt: list[int], mixture: Mixture = ()) -> "Stream":
        return Stream(self, prompt, mixture)

    def forget(self) -> None:
        """Begin the next answer from nothing. Takes no lock: the answer that failed still holds it."""
        self.stale = True

    def begin(self, prompt: list[int], mixture: Mixture) -> int:
        """Keep what the context has of this prompt, all but one token at most; returns how many that are."""
        assert self.state is not None, "closed"
        active = {name: weight for name, weight in mixture if weight}
        memory = self.library.llama_get_memory(self.state)
        keep = 0
        if active == self.active and not self.stale:
            keep = shared_beginning(self.held, prompt[:-1])
        if active != self.active:
            self._activate(active)
        if keep < len(self.held) or self.stale:
            cut = keep and self.library.llama_memory_seq_rm(memory, 0, keep, -1)
            if not cut:  # some models' states cannot be cut
                keep = 0
                self.library.llama_memory_clear(memory, False)
        self.held, self.stale = self.held[:keep], False
        return keep

    def _activate(self, active: dict[str, float]) -> None:
        pointers = (self.library.llama_adapter_lora_p_ctypes * len(active))(
            *(self.loaded[name] for name in active)
        )
        scales = (ctypes.c_float * len(active))(*active.values())
        code = self.library.llama_set_adapters_lora(self.state, pointers, len(active), scales)
        assert code == 0, code
        self.active = active

    def scores(self, ids: list[int]) -> torch.Tensor:
        """[1, V] of what follows `ids`, at most CHUNK of them; the context then holds them too."""
        tokens = (self.library.llama_token * len(ids))(*ids)
        with _complaints() as said:
            batch = self.library.llama_batch_get_one(tokens, len(ids))
            code = self.library.llama_decode(self.state, batch)
        row = None if code else self.library.llama_get_logits_ith(self.state, -1)
        if not row:
            self.stale = True  # what it holds now is not known
            reason = said[-1] if said else f"code {code}"
            kind = MemoryError if code == -2 or _is_allocation(reason) else RuntimeError
            raise kind(f"llama.cpp: {reason}")
        self.held += ids
        return torch.from_numpy(np.ctypeslib.as_array(row, (self.entries,)).copy())[None]

    def close(self) -> None:
        """Free the memory, once the answer that is being written has ended."""
        with self.lock:
            self.resources.close()
            self.state = None


class Stream:
    """One answer's use of the engine: a decoding.Stream. `reused`: tokens of the prompt not read again."""

    def __init__(self, engine: Engine, prompt: list[int], mixture: Mixture):
        self.engine, self.prompt, self.mixture = engine, prompt, mixture
        self.reused = 0
        self.has_lock = False
        self.scores: torch.Tensor | None = None

    def read(self) -> Iterator[int]:
        """Take the prompt in; yields how many tokens are read, 0 while another answer is being written."""
        while not self.engine.lock.acquire(timeout=TURN):
            yield 0
        self.has_lock = True
        self.reused = self.engine.begin(self.prompt, self.mixture)
        for start in range(self.reused, len(self.prompt), CHUNK):
            part = self.prompt[start : start + CHUNK]
            self.scores = self.engine.scores(part)
            yield start + len(part)

    def first(self) -> torch.Tensor:
        assert self.scores is not None, "read() comes first"
        return self.scores

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        assert list(parents) == [0], "one sequence"
        assert self.has_lock, "closed"
        return self.engine.scores(list(tokens))

    def close(self) -> None:
        """Let the next answer begin. Its keys and values stay, for the next turn of this conversation."""
        if self.has_lock:
            self.has_lock = False
            self.engine.lock.release()


def tokenizer_of(gguf: Path) -> Any:
    """The transformers tokenizer that a GGUF file carries; raises UserError (exit 4) when there is none."""
    from transformers import AutoTokenizer

    _check_magic(gguf)
    with tempfile.TemporaryDirectory(prefix="onecard-") as folder:  # files beside it may be another model's
        link = Path(folder) / "model.gguf"
        link.symlink_to(gguf.resolve())
        try:
            return AutoTokenizer.from_pretrained(folder, gguf_file=link.name)
        except Exception as error:  # a reader's many ways to fail on a damaged file
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            problem = f"{gguf}: its tokenizer cannot be read ({reason})."
            raise UserError(problem, "Use the model's folder instead.", CHECKPOINT) from None


_said: collections.deque[str] = collections.deque(maxlen=20)  # llama.cpp's errors, the newest last
_callbacks: list[Any] = []  # kept: llama.cpp calls it as long as the process lives


@functools.cache
def _library() -> Any:
    """The module llama_cpp with its log turned to us; raises UserError when it is not there."""
    try:
        library = importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        problem = f"llama-cpp-python cannot be used here ({error})."
        raise UserError(problem, "Run: bash tools/setup.sh cpu") from None
    _callbacks.append(library.llama_log_callback(_log))
    library.llama_log_set(_callbacks[-1], None)
    library.llama_backend_init()
    return library


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR_LEVEL and text.strip():
        _said.append(text.decode("utf-8", "replace").strip())


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """A list that at the end has the errors llama.cpp logged meanwhile."""
    _said.clear()
    said: list[str] = []
    yield said
    said.extend(_said)


def _unusable(path: Path, problem: str, said: list[str], fix: str, code: int = CHECKPOINT) -> UserError:
    if any(_is_allocation(line) for line in said):
        code, fix = MEMORY, "It needs more memory than there is free: use a smaller model or --context."
    reason = _reason(said)
    return UserError(f"{path}: {problem}{': ' + reason if reason else ''}.", fix, code)


def _reason(said: list[str]) -> str:
    """The first complaint without the function's name; those behind it only pass it on."""
    return said[0].split(": ", 1)[-1].strip(" .")[:300] if said else ""


def _is_allocation(line: str) -> bool:
    return any(word in line.lower() for word in ALLOCATION)


def _check_magic(path: Path) -> None:
    try:
        with open(path, "rb") as file:
            found = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", "Name a .gguf file.", CHECKPOINT) from None
    if found != b"GGUF":
        raise UserError(f"{path}: not a GGUF file.", "Name a .gguf file.", CHECKPOINT)


def _try_out(path: Path) -> None:
    """Load a stranger's vocabulary in a child first: llama.cpp ends its process at some damaged ones."""
    if fingerprint.cache_folder().resolve() in path.resolve().parents:
        return  # made here
    command = [sys.executable, "-c", TRIAL, str(path.resolve())]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode < 0:  # other failures are told when it is loaded here
        reason = (ended.stderr.strip().splitlines() or ["it crashes"])[-1].split(": ")[-1][:300]
        raise _unusable(path, "llama.cpp gives up", [f": {reason}"], AGAIN)


def _check_vocabulary(gguf: Path, entries: int, tokenizer: Any) -> None:
    highest = max(tokenizer.get_vocab().values())
    if highest >= entries:
        problem = f"{gguf}: it has {entries} tokens, the tokenizer's ids go up to {highest}."
        raise UserError(problem, "Use the tokenizer and the GGUF file of one model.", CHECKPOINT)
