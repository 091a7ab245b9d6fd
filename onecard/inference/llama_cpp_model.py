"""A GGUF file with adapters in llama.cpp: token ids of several sequences in, scores out, as numpy arrays.

With a file that is damaged or becomes shorter while it is mapped, llama.cpp ends the process that it runs in.
So the product uses this file only in the child of llama_cpp_process.py. It imports no torch: the child has to
start quickly.

Legend: V entries of the vocabulary.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from onecard.errors import MEMORY
from onecard.inference import llama_cpp as inference_llama_cpp
from onecard.inference.gguf_check import AGAIN, ANOTHER, because, is_allocation, unusable

CHUNK = 256  # the most tokens that are read at once


class Part(NamedTuple):
    """What one sequence contributes to a decode call."""

    sequence: int
    start: int  # tokens of the sequence that are in the context already
    ids: list[int]  # the tokens after them
    rows: int  # the scores after so many of the last ids are needed


class Model:
    """A GGUF file in memory, with adapters and one context for several sequences.

    It keeps no account of what the context holds.
    """

    def __init__(
        self,
        gguf: Path,
        context: int,
        adapters: Mapping[str, Path],
        threads: int,
        exact: bool = False,
        sequences: int = 1,
    ):
        """The arguments are those of llama_cpp_engine.Engine.

        Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it needs too much memory.
        """
        self.threads, self.exact, self.sequences = threads, exact, sequences
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
            self.batch = self._make_batch()
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
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.context * self.sequences, CHUNK, CHUNK
        settings.n_seq_max, settings.kv_unified = self.sequences, self.sequences > 1
        settings.n_threads = settings.n_threads_batch = self.threads
        if self.exact:
            settings.type_k = settings.type_v = self.library.GGML_TYPE_F32
            settings.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with inference_llama_cpp.collected_errors() as errors:
            state = self.library.llama_init_from_model(self.model, settings)
        if not state:
            times = f"{self.sequences} times " if self.sequences > 1 else ""
            problem = because(f"llama.cpp has no room for {times}{self.context} tokens", errors)
            raise unusable(gguf, problem, "", MEMORY)
        return state

    def _load_adapter(self, path: Path) -> Any:
        with inference_llama_cpp.collected_errors() as errors:
            adapter = self.library.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not adapter:  # adapters that were loaded before are freed with the model
            raise unusable(path, because("the adapter does not fit this base model", errors), ANOTHER)
        return adapter

    def cut(self, sequence: int, length: int) -> int:
        """Keep the first `length` tokens of a sequence; returns how many stay: `length`, or 0."""
        memory = self.library.llama_get_memory(self.state)
        if length and self.library.llama_memory_seq_rm(memory, sequence, length, -1):
            return length
        self.library.llama_memory_seq_rm(memory, sequence, -1, -1)  # the state of some models cannot be cut
        return 0

    def copy(self, source: int, target: int, length: int) -> int:
        """Let `target` hold the first `length` tokens of another sequence; returns how many it holds.

        They are not stored twice. It is `length`, or 0 where the state of the model cannot be cut.
        """
        memory = self.library.llama_get_memory(self.state)
        self.library.llama_memory_seq_rm(memory, target, -1, -1)
        self.library.llama_memory_seq_cp(memory, source, target, -1, -1)
        return self.cut(target, length)

    def activate(self, active: Mapping[str, float]) -> None:
        """Let these adapters, name -> weight, be the active ones."""
        pointers = (self.library.llama_adapter_lora_p_ctypes * len(active))(
            *(self.loaded[name] for name in active)
        )
        scales = (ctypes.c_float * len(active))(*active.values())
        code = self.library.llama_set_adapters_lora(self.state, pointers, len(active), scales)
        assert code == 0, code

    def decode(self, parts: Iterable[Part]) -> list[npt.NDArray[np.float32]]:
        """Scores [V] for each row that a part needs, in their order; the ids are added to the context.

        All ids together are at most CHUNK. The rows are memory of llama.cpp, which the next call overwrites.
        Raises MemoryError or RuntimeError; then these sequences are in no known state.
        """
        parts = [Part(*part) for part in parts]
        count = sum(len(part.ids) for part in parts)
        batch = self._batch_of(parts, count)
        inference_llama_cpp.forget_errors()
        code = self.library.llama_decode(self.state, batch)
        rows = [] if code else [self.library.llama_get_logits_ith(self.state, n) for n in _scored(parts)]
        if code or not all(rows):
            errors = inference_llama_cpp.logged_errors()
            reason = errors[-1] if errors else f"code {code}"
            kind = MemoryError if code == -2 or is_allocation(reason) else RuntimeError
            raise kind(f"llama.cpp: {reason}")
        if not rows:
            self.library.llama_synchronize(self.state)
        return [np.ctypeslib.as_array(row, (self.entries,)) for row in rows]

    def _batch_of(self, parts: list[Part], count: int) -> Any:
        assert count <= CHUNK, count
        batch, place = self.batch, 0
        batch.n_tokens = count
        for part in parts:
            scored = len(part.ids) - part.rows
            for number, token in enumerate(part.ids):
                batch.token[place], batch.pos[place] = token, part.start + number
                batch.seq_id[place] = self.names[part.sequence]
                batch.logits[place] = number >= scored
                place += 1
        return batch

    def _make_batch(self) -> Any:
        """A batch for CHUNK tokens, which every call fills anew."""
        library = self.library
        pointer = ctypes.POINTER(library.llama_seq_id)
        self.numbers = [(library.llama_seq_id * 1)(number) for number in range(self.sequences)]
        self.names = [ctypes.cast(number, pointer) for number in self.numbers]
        return library.llama_batch(
            token=(library.llama_token * CHUNK)(),
            pos=(library.llama_pos * CHUNK)(),
            n_seq_id=(ctypes.c_int32 * CHUNK)(*[1] * CHUNK),
            seq_id=(pointer * CHUNK)(),
            logits=(ctypes.c_int8 * CHUNK)(),
        )

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


def _scored(parts: list[Part]) -> list[int]:
    """Numbers, within the batch, of the tokens after which scores are needed."""
    numbers: list[int] = []
    end = 0
    for part in parts:
        end += len(part.ids)
        numbers += range(end - part.rows, end)
    return numbers
