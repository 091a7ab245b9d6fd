"""Text generation by transformers: token ids in, scores of the next token out.

greedy answers a batch of prompts with a model that may be in training. No conversation and no template is
known here.
"""

import contextlib
import itertools
import threading
from collections import abc
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, GenerationConfig

from onecard.config.generation import ActiveAdapters
from onecard.errors import UserError
from onecard.inference import engine as engines
from onecard.inference.decoding import shared_beginning
from onecard.models import adapter as models_adapter
from onecard.models import trainable
from onecard.system import hardware

CHUNK = 512  # tokens of a prompt read at once: between two chunks an answer can be stopped


KEPT = 2  # conversations whose keys and values are kept for their next turn


@torch.inference_mode()
def greedy(
    model: torch.nn.Module, prompts: list[list[int]], max_new_tokens: int, ends: list[int]
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to one of the end tokens; prompts run as one batch.

    Works on a model that is being trained: its attention, mode and caches are as before afterwards.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor(
        [[ends[0]] * (longest - len(p)) + p for p in prompts], device=device
    )  # [B, T], padded at the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers gives it no types
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=ends,
        pad_token_id=ends[0],
        use_cache=True,
    )
    with _ready_to_generate(model):
        # torch says nothing of what a module adds
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    answers = made[:, longest:].tolist()
    return [list(itertools.takewhile(lambda token: token not in ends, answer)) for answer in answers]


@contextlib.contextmanager
def _ready_to_generate(model: torch.nn.Module) -> Iterator[None]:
    base = trainable.base_of(model)
    attention, training = base.config._attn_implementation, model.training
    if attention != "eager":  # a model's only one
        base.set_attn_implementation("sdpa")  # takes padding and a cache, which packed attention does not
    model.eval()
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        model.train(training)


class Engine:
    """A model in memory that several answers may use at once; each step of each is one turn at the lock."""

    name = "transformers"
    capabilities: ClassVar = engines.Capabilities(interleaves=True)
    is_loaded = True

    def __init__(self, model: Any, tokenizer: Any, context: int, adapters: abc.Sequence[str] = ()):
        """context: tokens of prompt and answer together; adapters: names of those attached to the model."""
        self.model, self.tokenizer, self.context, self.adapters = model, tokenizer, context, list(adapters)
        self.device = next(model.parameters()).device
        self.lock = threading.Lock()
        self.active: ActiveAdapters | None = None
        self.kept: list[tuple[ActiveAdapters, list[int], DynamicCache]] = []

    @property
    def placement(self) -> engines.Placement:
        return engines.Placement(str(self.device))

    def load(self) -> None:
        """It is there from the beginning."""

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be used so."""
        for name, weight in active_adapters:
            engines.check_adapter(name, self.adapters)
            if models_adapter.has_whole_modules(self.model, name) and (
                weight != 1 or len(active_adapters) > 1
            ):
                problem = f"Adapter {name} holds trained embeddings, which cannot be weighted or mixed."
                raise UserError(problem, "Use it alone, with weight 1.")

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> "Sequence":
        return Sequence(self, prompt, active_adapters)

    def forget(self) -> None:
        """Let go of all kept keys and values, after running out of memory."""
        with self.lock:
            self.kept.clear()
        hardware.forget_cached_memory(str(self.device))

    def close(self) -> None:
        with self.lock:
            self.model = None
        self.forget()

    def new_cache(self) -> DynamicCache:
        if self.model is None:
            raise RuntimeError("The engine is closed.")
        return DynamicCache(config=trainable.base_of(self.model).config)

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> Iterator[torch.Tensor]:
        """[t, V] of what follows each of `ids`, some tokens at a time; nothing comes before the first."""
        cache = self.new_cache()
        for start in range(0, len(ids), CHUNK):
            yield self._logits([ids[start : start + CHUNK]], cache, active_adapters, 0)[0]

    def scores(
        self, ids: list[list[int]], cache: DynamicCache, active_adapters: ActiveAdapters
    ) -> torch.Tensor:
        """[B, V] after ids [B, T]; the cache holds what came before, and then also them."""
        return self._logits(ids, cache, active_adapters, 1)[:, -1]

    @torch.inference_mode()
    def _logits(
        self, ids: list[list[int]], cache: DynamicCache, active_adapters: ActiveAdapters, keep: int
    ) -> torch.Tensor:
        """[B, keep, V], or [B, T, V] with 0, the last positions' of ids [B, T]."""
        with self.lock:
            if self.model is None:
                raise RuntimeError("The engine is closed.")
            if self.adapters and active_adapters != self.active:
                self.active = None  # until it is whole
                models_adapter.mix(self.model, dict(active_adapters))
                self.active = active_adapters
            given = torch.tensor(ids, device=self.device)
            made = self.model(input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=keep)
            logits: torch.Tensor = made.logits
            return logits

    def take(self, prompt: list[int], active_adapters: ActiveAdapters) -> tuple[DynamicCache, int]:
        """A cache that holds the beginning of the prompt, and how much of it; all but one token at most."""
        with self.lock:
            best, length = None, 0
            for entry in self.kept:
                common = shared_beginning(entry[1], prompt[:-1]) if entry[0] == active_adapters else 0
                if common > length:
                    best, length = entry, common
            if best is None:
                return self.new_cache(), 0
            self.kept.remove(best)
        _, ids, cache = best
        if length < len(ids):
            cache.crop(length - len(ids))
        return cache, length

    def keep(self, ids: list[int], cache: DynamicCache, active_adapters: ActiveAdapters) -> None:
        """Keep what a conversation's next turn will begin with, if the cache can go back to a part of it."""
        if not all(_can_be_cut(layer) for layer in cache.layers):
            return
        ids = ids[: cache.get_seq_length()]
        if ids:
            with self.lock:
                if self.model is not None:  # nobody asks a closed engine again
                    self.kept = [*self.kept, (active_adapters, ids, cache)][-KEPT:]


class Sequence:
    """One answer's use of the engine: an engine.Sequence."""

    def __init__(self, engine: Engine, prompt: list[int], active_adapters: ActiveAdapters):
        self.engine, self.prompt, self.active_adapters = engine, prompt, active_adapters
        self.cache, self.reused = engine.take(prompt, active_adapters)
        self.rows: list[list[int]] = [[]]  # tokens behind the prompt, of each sequence
        self.scores: torch.Tensor | None = None
        self.cancelled = self.closed = False
        self.whole = True  # no error came in the middle of a step, when some layers know more than others

    def read(self) -> Iterator[int]:
        for start in range(self.reused, len(self.prompt), CHUNK):
            if self.cancelled:
                return
            part = self.prompt[start : start + CHUNK]
            self.whole = False
            self.scores = self.engine.scores([part], self.cache, self.active_adapters)
            self.whole = True
            yield start + len(part)

    def first(self) -> torch.Tensor:
        self._check_goes_on()
        assert self.scores is not None, "read() comes first"
        return self.scores

    def advance(self, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> torch.Tensor:
        self._check_goes_on()
        self.whole = False
        if list(parents) != list(range(len(self.rows))):
            self.cache.batch_select_indices(torch.tensor(parents, device=self.engine.device))
        self.rows = [[*self.rows[p], token] for p, token in zip(parents, tokens, strict=True)]
        scores = self.engine.scores([[token] for token in tokens], self.cache, self.active_adapters)
        self.whole = True
        return scores

    def cancel(self) -> None:
        self.cancelled = True

    def _check_goes_on(self) -> None:
        if self.cancelled or self.closed:
            raise RuntimeError("The sequence was cancelled or closed.")

    def close(self) -> None:
        """Give keys and values back, for the next turn of this conversation."""
        closed, self.closed = self.closed, True
        if self.whole and not closed:
            if len(self.rows) > 1:
                self.cache.batch_select_indices(torch.tensor([0], device=self.engine.device))
            self.engine.keep([*self.prompt, *self.rows[0]], self.cache, self.active_adapters)


def _can_be_cut(layer: Any) -> bool:
    """Whether a layer of a cache can forget its last tokens; a window that has moved has lost older ones."""
    moved = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window
    return getattr(layer, "is_croppable", False) and not moved


def _is_an_engine(engine: Engine) -> engines.Engine:
    """For the type checker alone."""
    return engine
