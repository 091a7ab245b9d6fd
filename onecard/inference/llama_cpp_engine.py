"""Text generation by llama.cpp: token ids in, scores of the next token out. No graphics card, no torch model.

It knows no conversation, no template and nothing of how a token is chosen: decoding.py does that for both
engines. The tokenizer is transformers', so that prompts are those of training. The context holds one
sequence: who asks second waits.

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
from onecard.inference import engine as engines
from onecard.inference import gguf_check
from onecard.inference import llama_cpp as llama_cpp_library
from onecard.inference.decoding import shared_beginning
from onecard.inference.gguf_check import AGAIN, ANOTHER, because, is_allocation, unusable

CHUNK = 256  # tokens of a prompt read at once: between two chunks an answer can be stopped
TURN = 0.2  # seconds between two looks of one who waits


class Engine:
    """A GGUF file in memory, with adapters. One answer at a time has it, from its read() to its close()."""

    name = "llama.cpp"
    capabilities: ClassVar = engines.Capabilities(
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
        gpu_layers: int = 0,
        exact: bool = False,
    ):
        """context: tokens of prompt and answer together, at most what the model was trained for; adapters:
        name -> GGUF adapter; threads: torch's number unless given; gpu_layers: -1 = all; exact: keys and
        values in fp32, to compare with others; llama.cpp's own choice, fp16, is smaller and faster.

        Raises UserError: exit 4 for a file that llama.cpp cannot use, exit 6 when it needs too much memory.
        """
        self.path, self.tokenizer, self.adapters = gguf, tokenizer, list(adapters or {})
        self.threads, self.gpu_layers = threads or torch.get_num_threads(), gpu_layers
        self.exact = exact
        self.lock = threading.Lock()  # of the whole sequence, not of a step
        self.held: list[int] = []  # tokens whose keys and values the context has
        self.active: dict[str, float] = {}
        self.stale = False
        self.row: tuple[int, torch.Tensor] = 0, torch.empty(0)  # address and view of llama.cpp's scores
        self.library = llama_cpp_library.library()
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
        settings.n_gpu_layers = self.gpu_layers
        with llama_cpp_library.complaints() as said:
            model = self.library.llama_model_load_from_file(os.fsencode(gguf), settings)
        if not model:
            raise unusable(gguf, because("llama.cpp cannot load it", said), AGAIN)
        return model

    def _make_state(self, gguf: Path) -> Any:
        settings = self.library.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = self.context, CHUNK, CHUNK
        settings.n_threads = settings.n_threads_batch = self.threads
        if self.exact:
            settings.type_k = settings.type_v = self.library.GGML_TYPE_F32
            settings.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        with llama_cpp_library.complaints() as said:
            state = self.library.llama_init_from_model(self.model, settings)
        if not state:
            problem = because(f"llama.cpp has no room for {self.context} tokens", said)
            raise unusable(gguf, problem, "", MEMORY)
        return state

    def _load_adapter(self, path: Path) -> Any:
        with llama_cpp_library.complaints() as said:
            adapter = self.library.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not adapter:  # the model frees those it has
            raise unusable(path, because("the adapter does not fit this base model", said), ANOTHER)
        return adapter

    @property
    def placement(self) -> engines.Placement:
        return engines.Placement("cpu", self.threads, self.gpu_layers)

    def load(self) -> None:
        """It is there from the beginning."""

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be used so."""
        for name, _ in active_adapters:
            engines.check_adapter(name, self.adapters)

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> "Sequence":
        self._check_open()
        return Sequence(self, prompt, active_adapters)

    def _check_open(self) -> None:
        if self.state is None:
            raise RuntimeError("The engine is closed.")

    def forget(self) -> None:
        """Begin the next answer from nothing. Takes no lock: the answer that failed still holds it."""
        self.stale = True

    def begin(self, prompt: list[int], active_adapters: ActiveAdapters) -> int:
        """Keep what the context has of this prompt, all but one token at most; returns how many that are."""
        self._check_open()
        active = {name: weight for name, weight in active_adapters if weight}
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

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> Iterator[torch.Tensor]:
        """[t, V] of what follows each of `ids`, some tokens at a time; nothing comes before the first."""
        with self.lock:
            self.begin([], active_adapters)
            for start in range(0, len(ids), CHUNK):
                yield self.scores(ids[start : start + CHUNK], each=True)

    def scores(self, ids: list[int], each: bool = False) -> torch.Tensor:
        """[1, V] of what follows `ids`, at most CHUNK of them; the context then holds them too.

        It is llama.cpp's own memory, which the next call writes over. each: [len(ids), V], what follows each
        of them, in memory of its own.
        """
        tokens = (self.library.llama_token * len(ids))(*ids)
        rows = len(ids) if each else 1
        wanted = (ctypes.c_int8 * len(ids))(*[1] * rows) if each else None
        llama_cpp_library.forget()
        batch = self.library.llama_batch_get_one(tokens, len(ids))
        batch.logits = wanted
        code = self.library.llama_decode(self.state, batch)
        row = None if code else self.library.llama_get_logits_ith(self.state, 0 if each else -1)
        if not row:
            self.stale = True  # what it holds now is not known
            said = llama_cpp_library.said()
            reason = said[-1] if said else f"code {code}"
            kind = MemoryError if code == -2 or is_allocation(reason) else RuntimeError
            raise kind(f"llama.cpp: {reason}")
        self.held += ids
        if each:
            return torch.from_numpy(np.ctypeslib.as_array(row, (rows, self.entries)).copy())
        address = ctypes.addressof(row.contents)
        if address != self.row[0]:  # hardly ever: a view costs more than all else here
            self.row = address, torch.from_numpy(np.ctypeslib.as_array(row, (1, self.entries)))
        return self.row[1]

    def encode(self, text: str) -> list[int]:
        """Ids of a text by the file's own vocabulary, added tokens in it as such; no token comes before."""
        given = text.encode()
        vocabulary = self.library.llama_model_get_vocab(self.model)
        room = len(given) + 8
        ids = (self.library.llama_token * room)()
        count = self.library.llama_tokenize(vocabulary, given, len(given), ids, room, False, True)
        assert 0 <= count <= room, count
        return list(ids[:count])

    def ends_with(self, token: int) -> bool:
        """Whether llama.cpp itself takes this token for the end of an answer."""
        return bool(self.library.llama_vocab_is_eog(self.library.llama_model_get_vocab(self.model), token))

    def written(self, key: str) -> str | None:
        """A text or number of the file's metadata, as text; None when it has no such key."""
        size = self.library.llama_model_meta_val_str(self.model, key.encode(), None, 0)
        if size < 0:
            return None
        text = ctypes.create_string_buffer(size + 1)
        self.library.llama_model_meta_val_str(self.model, key.encode(), text, size + 1)
        return text.value.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the memory, once the answer that is being written has ended."""
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
        """Take the prompt in; yields how many tokens are read, 0 while another answer is being written."""
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
        assert list(parents) == [0], "one sequence"
        return self.engine.scores(list(tokens))

    def cancel(self) -> None:
        self.cancelled = True

    def _check_goes_on(self) -> None:
        if self.cancelled or not self.has_lock:
            raise RuntimeError("The sequence was cancelled or closed, or not read.")

    def close(self) -> None:
        """Let the next answer begin. Its keys and values stay, for the next turn of this conversation."""
        if self.has_lock:
            self.has_lock = False
            self.engine.lock.release()


def _is_an_engine(engine: Engine) -> engines.Engine:
    """For the type checker alone."""
    return engine


def _check_vocabulary(gguf: Path, entries: int, tokenizer: Any) -> None:
    # transformers adds a token of its own when it reads a GGUF file
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    highest = max(token for token in tokenizer.get_vocab().values() if token not in special)
    if highest >= entries:
        problem = f"{gguf}: it has {entries} tokens, the tokenizer's ids go up to {highest}."
        raise UserError(problem, "Use the tokenizer and the GGUF file of one model.", CHECKPOINT)
