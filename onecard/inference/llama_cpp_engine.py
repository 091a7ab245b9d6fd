"""Text generation by llama.cpp on the CPU: token ids in, scores of the next token out.

This file knows no conversation and no template, and decoding.py chooses the tokens for all engines. Prompts
are encoded by the tokenizer of transformers, so they are the same as in training. The context holds one
sequence; a second question waits for the first answer.

Legend: V entries of the vocabulary.
"""

import contextlib
import ctypes
import os
import threading
from collections import abc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from onecard.config.chat import ONE_SEQUENCE
from onecard.config.generation import BEAM, BEAM_SAMPLE, ActiveAdapters
from onecard.errors import CHECKPOINT, MEMORY, UserError
from onecard.inference import engine as inference_engine
from onecard.inference import gguf_check
from onecard.inference import llama_cpp as inference_llama_cpp
from onecard.inference.decoding import shared_beginning
from onecard.inference.gguf_check import AGAIN, ANOTHER, because, is_allocation, unusable

CHUNK = 256  # tokens of a prompt that are read at once; between two chunks an answer can be stopped
TURN = 0.2  # seconds after which a waiting sequence looks whether it was cancelled


class Engine:
    """A GGUF file in memory, with adapters. One answer at a time uses it, from its read() to its close()."""

    name = "llama.cpp"
    capabilities: ClassVar = inference_engine.Capabilities(
        interleaves=False, lacks={BEAM: ONE_SEQUENCE, BEAM_SAMPLE: ONE_SEQUENCE}
    )
    is_loaded = True

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

        Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it needs too much memory.
        """
        self.path, self.tokenizer, self.adapters = gguf, tokenizer, list(adapters or {})
        self.threads, self.exact = threads or torch.get_num_threads(), exact
        self.lock = threading.Lock()  # held for a whole answer, not only for a step
        self.context_ids: list[int] = []  # tokens whose keys and values are in the context
        self.active: dict[str, float] = {}
        self.stale = False  # whether a step failed, so that the context is in no known state
        self.row: tuple[int, torch.Tensor] = 0, torch.empty(0)  # address and view of the scores in llama.cpp
        self.library = inference_llama_cpp.library()
        gguf_check.check(gguf, list((adapters or {}).values()))
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
        settings = self.library.llama_model_default_params()
        settings.n_gpu_layers = 0
        with inference_llama_cpp.collected_errors() as errors:
            model = self.library.llama_model_load_from_file(os.fsencode(gguf), settings)
        if not model:
            raise unusable(gguf, because("llama.cpp cannot load it", errors), AGAIN)
        return model

    def _make_state(self, gguf: Path) -> Any:
        settings = self.library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.context, CHUNK, CHUNK
        settings.n_threads = settings.n_threads_batch = self.threads
        if self.exact:
            settings.type_k = settings.type_v = self.library.GGML_TYPE_F32
            settings.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with inference_llama_cpp.collected_errors() as errors:
            state = self.library.llama_init_from_model(self.model, settings)
        if not state:
            problem = because(f"llama.cpp has no room for {self.context} tokens", errors)
            raise unusable(gguf, problem, "", MEMORY)
        return state

    def _load_adapter(self, path: Path) -> Any:
        with inference_llama_cpp.collected_errors() as errors:
            adapter = self.library.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not adapter:  # adapters that were loaded before are freed with the model
            raise unusable(path, because("the adapter does not fit this base model", errors), ANOTHER)
        return adapter

    @property
    def placement(self) -> inference_engine.Placement:
        return inference_engine.Placement("cpu", self.threads)

    def load(self) -> None:
        """Nothing to do: the constructor has loaded the model."""

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be active with these weights."""
        for name, _ in active_adapters:
            inference_engine.check_adapter(name, self.adapters)

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> "Sequence":
        self._check_open()
        return Sequence(self, prompt, active_adapters)

    def _check_open(self) -> None:
        if self.state is None:
            raise RuntimeError("The engine is closed.")

    def forget(self) -> None:
        """Start the next answer with an empty context. Takes no lock, as the failed answer still holds it."""
        self.stale = True

    def begin(self, prompt: list[int], active_adapters: ActiveAdapters) -> int:
        """Cut the context to the tokens that this prompt begins with; returns how many they are.

        At least one token of the prompt is left to be read, since its scores are needed.
        """
        self._check_open()
        active = {name: weight for name, weight in active_adapters if weight}
        memory = self.library.llama_get_memory(self.state)
        keep = 0
        if active == self.active and not self.stale:
            keep = shared_beginning(self.context_ids, prompt[:-1])
        if active != self.active:
            self._activate(active)
        if keep < len(self.context_ids) or self.stale:
            is_cut = keep and self.library.llama_memory_seq_rm(memory, 0, keep, -1)
            if not is_cut:  # the state of some models cannot be cut
                keep = 0
                self.library.llama_memory_clear(memory, False)
        self.context_ids, self.stale = self.context_ids[:keep], False
        return keep

    def _activate(self, active: dict[str, float]) -> None:
        pointers = (self.library.llama_adapter_lora_p_ctypes * len(active))(
            *(self.loaded[name] for name in active)
        )
        scales = (ctypes.c_float * len(active))(*active.values())
        code = self.library.llama_set_adapters_lora(self.state, pointers, len(active), scales)
        assert code == 0, code
        self.active = active

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> Iterator[torch.Tensor]:
        """Scores [t, V] of the token after each of `ids`, some tokens at a time; `ids` begin the sequence."""
        with self.lock:
            self.begin([], active_adapters)
            for start in range(0, len(ids), CHUNK):
                yield self.scores(ids[start : start + CHUNK], each=True)

    def scores(self, ids: list[int], each: bool = False) -> torch.Tensor:
        """Scores [1, V] of the token after `ids`, which are at most CHUNK and are added to the context.

        The result is memory of llama.cpp, which the next call overwrites. each: [len(ids), V], the scores
        after each of the ids, in memory of their own.
        """
        tokens = (self.library.llama_token * len(ids))(*ids)
        rows = len(ids) if each else 1
        is_scored = (ctypes.c_int8 * len(ids))(*[1] * rows) if each else None
        inference_llama_cpp.forget_errors()
        batch = self.library.llama_batch_get_one(tokens, len(ids))
        batch.logits = is_scored
        code = self.library.llama_decode(self.state, batch)
        row = None if code else self.library.llama_get_logits_ith(self.state, 0 if each else -1)
        if not row:
            self.stale = True
            errors = inference_llama_cpp.logged_errors()
            reason = errors[-1] if errors else f"code {code}"
            kind = MemoryError if code == -2 or is_allocation(reason) else RuntimeError
            raise kind(f"llama.cpp: {reason}")
        self.context_ids += ids
        if each:
            return torch.from_numpy(np.ctypeslib.as_array(row, (rows, self.entries)).copy())
        address = ctypes.addressof(row.contents)
        if address != self.row[0]:  # this is rare, so the view is kept: making it is the slow part here
            self.row = address, torch.from_numpy(np.ctypeslib.as_array(row, (1, self.entries)))
        return self.row[1]

    def encode(self, text: str) -> list[int]:
        """Ids of a text by the vocabulary in the file, without BOS; names of added tokens become tokens."""
        raw = text.encode()
        vocabulary = self.library.llama_model_get_vocab(self.model)
        room = len(raw) + 8
        ids = (self.library.llama_token * room)()
        count = self.library.llama_tokenize(vocabulary, raw, len(raw), ids, room, False, True)
        assert 0 <= count <= room, count
        return list(ids[:count])

    def ends_with(self, token: int) -> bool:
        """Whether this token ends an answer in llama.cpp."""
        return bool(self.library.llama_vocab_is_eog(self.library.llama_model_get_vocab(self.model), token))

    def written(self, key: str) -> str | None:
        """An entry of the metadata in the file, as text; None when there is no such key."""
        size = self.library.llama_model_meta_val_str(self.model, key.encode(), None, 0)
        if size < 0:
            return None
        text = ctypes.create_string_buffer(size + 1)
        self.library.llama_model_meta_val_str(self.model, key.encode(), text, size + 1)
        return text.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the memory as soon as no answer is in progress."""
        with self.lock:
            self.resources.close()
            self.state = None


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


def _check_vocabulary(gguf: Path, entries: int, tokenizer: Any) -> None:
    # special tokens do not count, because transformers adds one of its own when it reads a GGUF file
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max(token for token in tokenizer.get_vocab().values() if token not in special)
    if highest >= entries:
        problem = f"{gguf}: the file has {entries} tokens, but the ids of the tokenizer go up to {highest}."
        raise UserError(problem, "Use the tokenizer and the GGUF file of one model.", CHECKPOINT)
