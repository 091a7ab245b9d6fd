"""A GGUF file with adapters in llama.cpp: token ids in, scores of the next token out, as numpy arrays.

With a file that is damaged or becomes shorter while it is mapped, llama.cpp ends the process that it runs in.
So the product uses this file only in the child of llama_cpp_process.py. It imports no torch: the child has to
start quickly.

Legend: V entries of the vocabulary.
"""

import contextlib
import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onecard.errors import MEMORY
from onecard.inference import llama_cpp as inference_llama_cpp
from onecard.inference.gguf_check import AGAIN, ANOTHER, because, is_allocation, unusable

CHUNK = 256  # the most tokens that are read at once


class Model:
    """A GGUF file in memory, with adapters and one context. It keeps no account of what the context holds."""

    def __init__(
        self, gguf: Path, context: int, adapters: Mapping[str, Path], threads: int, exact: bool = False
    ):
        """The arguments are those of llama_cpp_engine.Engine.

        Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it needs too much memory.
        """
        self.threads, self.exact = threads, exact
        self.library = inference_llama_cpp.library()
        with contextlib.ExitStack() as stack:
            self.model = self._load_model(gguf)
            stack.callback(self.library.llama_model_free, self.model)
            self.vocabulary = self.library.llama_model_get_vocab(self.model)
            self.entries: int = self.library.llama_vocab_n_tokens(self.vocabulary)
            self.context = min(context, self.library.llama_model_n_ctx_train(self.model))
            self.state = self._make_state(gguf)
            stack.callback(self.library.llama_free, self.state)
            self.loaded = {name: self._load_adapter(path) for name, path in adapters.items()}
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

    def cut(self, length: int) -> int:
        """Keep the first `length` tokens of the context; returns how many stay: `length`, or 0."""
        memory = self.library.llama_get_memory(self.state)
        if length and self.library.llama_memory_seq_rm(memory, 0, length, -1):
            return length
        self.library.llama_memory_clear(memory, False)  # the state of some models cannot be cut
        return 0

    def activate(self, active: Mapping[str, float]) -> None:
        """Let these adapters, name -> weight, be the active ones."""
        pointers = (self.library.llama_adapter_lora_p_ctypes * len(active))(
            *(self.loaded[name] for name in active)
        )
        scales = (ctypes.c_float * len(active))(*active.values())
        code = self.library.llama_set_adapters_lora(self.state, pointers, len(active), scales)
        assert code == 0, code

    def scores(self, ids: list[int], each: bool = False) -> npt.NDArray[np.float32]:
        """Scores [1, V] of the token after `ids`, which are at most CHUNK and are added to the context.

        each: [len(ids), V], the scores after each of the ids. The result is memory of llama.cpp, which the
        next call overwrites. Raises MemoryError or RuntimeError; then the context is in no known state.
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
            errors = inference_llama_cpp.logged_errors()
            reason = errors[-1] if errors else f"code {code}"
            kind = MemoryError if code == -2 or is_allocation(reason) else RuntimeError
            raise kind(f"llama.cpp: {reason}")
        return np.ctypeslib.as_array(row, (rows, self.entries))

    def encode(self, text: str) -> list[int]:
        """Ids of a text by the vocabulary in the file, without BOS; names of added tokens become tokens."""
        raw = text.encode()
        room = len(raw) + 8
        ids = (self.library.llama_token * room)()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), ids, room, False, True)
        assert 0 <= count <= room, count
        return list(ids[:count])

    def ends_with(self, token: int) -> bool:
        """Whether this token ends an answer in llama.cpp."""
        return bool(self.library.llama_vocab_is_eog(self.vocabulary, token))

    def written(self, key: str) -> str | None:
        """An entry of the metadata in the file, as text; None when there is no such key."""
        size = self.library.llama_model_meta_val_str(self.model, key.encode(), None, 0)
        if size < 0:
            return None
        text = ctypes.create_string_buffer(size + 1)
        self.library.llama_model_meta_val_str(self.model, key.encode(), text, size + 1)
        return text.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the memory."""
        self.resources.close()
