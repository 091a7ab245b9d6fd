"""Text generation by transformers: token ids in, scores of the next token out.

greedy answers a batch of prompts with a model that may be in training. This file knows no conversation and no
template.
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
from onecard.inference import engine as inference_engine
from onecard.inference import joined_caches
from onecard.inference.batching import Batching, Share, Step
from onecard.inference.decoding import shared_beginning
from onecard.inference.slots import Slot, mixture_of
from onecard.models import adapter as models_adapter
from onecard.models import trainable
from onecard.system import hardware

CHUNK = 512  # tokens of a prompt that are read at once; between two chunks an answer can be stopped
KEPT = 2  # conversations whose keys and values are kept for their next turn


@torch.inference_mode()
def greedy(
    model: torch.nn.Module, prompts: list[list[int]], max_new_tokens: int, eos_ids: list[int]
) -> list[list[int]]:
    """The most probable continuation of each prompt, up to one of the EOS ids; the prompts run as one batch.

    This works on a model that is being trained: afterwards its attention and its mode are as before.
    """
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor(
        [[eos_ids[0]] * (longest - len(p)) + p for p in prompts], device=device
    )  # [B, T], padded on the left
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers has no types for it
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos_ids,
        pad_token_id=eos_ids[0],
        use_cache=True,
    )
    with _ready_to_generate(model):
        # torch declares no types for the methods of a module
        sequences = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)  # type: ignore[operator]
    answers = sequences[:, longest:].tolist()
    return [list(itertools.takewhile(lambda token: token not in eos_ids, answer)) for answer in answers]


@contextlib.contextmanager
def _ready_to_generate(model: torch.nn.Module) -> Iterator[None]:
    base = trainable.base_of(model)
    attention, training = base.config._attn_implementation, model.training
    if attention != "eager":  # which would be the only one that the model has
        base.set_attn_implementation("sdpa")  # packed attention knows neither padding nor a cache
    model.eval()
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        model.train(training)


class Engine:
    """A model in memory that several answers may use at once; they take turns, step by step.

    With `together`, steps of one mixture of adapters are computed at once where the model allows it.
    """

    name = "transformers"
    capabilities: ClassVar = inference_engine.Capabilities(interleaves=True)
    is_loaded = True

    is_dead = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        context: int,
        adapters: abc.Sequence[str] = (),
        together: bool = False,
    ):
        """context: tokens of prompt and answer together; adapters: names of the adapters in the model.

        together: for many users; scores are then rounded a little differently from those of one user.
        """
        self.model, self.tokenizer, self.context, self.adapters = model, tokenizer, context, list(adapters)
        self.device = next(model.parameters()).device
        self.lock = threading.Lock()
        self.active: ActiveAdapters | None = None
        self.caches: list[tuple[ActiveAdapters, list[int], DynamicCache]] = []
        self.batching = Batching(CHUNK) if together else None
        self.sequences: dict[Slot, Sequence] = {}  # those that are read or answered now, with `together`

    @property
    def slots(self) -> abc.Sequence[Slot]:
        """For batching: one for each sequence."""
        return list(self.sequences)

    @property
    def placement(self) -> inference_engine.Placement:
        return inference_engine.Placement(str(self.device))

    def why_ended(self) -> str:
        return ""

    def load(self) -> None:
        """Nothing to do: the model was loaded before."""

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be active with these weights."""
        for name, weight in active_adapters:
            inference_engine.check_adapter(name, self.adapters)
            if models_adapter.has_whole_modules(self.model, name) and (
                weight != 1 or len(active_adapters) > 1
            ):
                problem = f"Adapter {name} holds trained embeddings, which cannot be weighted or mixed."
                raise UserError(problem, "Use it alone, with weight 1.")

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> "Sequence":
        return Sequence(self, prompt, active_adapters)

    def forget(self) -> None:
        """Free all keys and values that were kept for next turns, after memory ran out."""
        with self.lock:
            self.caches.clear()
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
        """Scores [t, V] of the token after each of `ids`, some tokens at a time; `ids` begin the sequence."""
        cache = self.new_cache()
        for start in range(0, len(ids), CHUNK):
            yield self._logits([ids[start : start + CHUNK]], cache, active_adapters, 0)[0]

    def scores(
        self, ids: list[list[int]], cache: DynamicCache, active_adapters: ActiveAdapters
    ) -> torch.Tensor:
        """Scores [B, V] of the token after ids [B, T], which are added to the cache of the tokens before."""
        return self._logits(ids, cache, active_adapters, 1)[:, -1]

    def add(self, batch: abc.Sequence[Share]) -> None:
        """Compute what these steps ask for, all of one mixture: answers together, prompts one by one."""
        shares = list(batch)
        answers = [share for share in shares if share.step.slot.answers]
        if len(answers) > 1 and self._add_together(
            [self.sequences[step.slot] for step, _ in answers], answers
        ):
            shares = [share for share in shares if share not in answers]
        for step, count in shares:
            try:
                self.sequences[step.slot].add(step.ids[:count])
                step.count = count
            except (MemoryError, RuntimeError) as error:
                step.error = error

    def _add_together(self, sequences: abc.Sequence["Sequence"], shares: abc.Sequence[Share]) -> bool:
        """Add one token to each sequence; False when they have to take turns, and nothing was changed."""
        caches = [sequence.cache for sequence in sequences]
        if self.model is None or not joined_caches.can_be_joined(trainable.base_of(self.model), caches):
            return False
        ids, beside = [step.ids for step, _ in shares], joined_caches.inputs_beside(caches, self.device)
        try:
            joined = joined_caches.join(caches)
            rows = self._logits(ids, joined, sequences[0].active_adapters, 1, **beside)[:, -1]
        except (MemoryError, RuntimeError):  # there may be room for one at a time
            return False
        joined_caches.part_again(joined, caches)
        for number, (sequence, (step, count)) in enumerate(zip(sequences, shares, strict=True)):
            sequence.scores, step.count = rows[number : number + 1], count
        return True

    @torch.inference_mode()
    def _logits(
        self,
        ids: list[list[int]],
        cache: DynamicCache,
        active_adapters: ActiveAdapters,
        keep: int,
        **beside: torch.Tensor,
    ) -> torch.Tensor:
        """Scores [B, keep, V] after the last `keep` positions of ids [B, T]; keep 0: [B, T, V], after all.

        beside: other inputs of the model, where the rows have different lengths.
        """
        with self.lock:
            if self.model is None:
                raise RuntimeError("The engine is closed.")
            if self.adapters and active_adapters != self.active:
                self.active = None  # in case the change fails halfway
                models_adapter.mix(self.model, dict(active_adapters))
                self.active = active_adapters
            inputs = torch.tensor(ids, device=self.device)
            outputs = self.model(
                input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=keep, **beside
            )
            logits: torch.Tensor = outputs.logits
            return logits

    def take(self, prompt: list[int], active_adapters: ActiveAdapters) -> tuple[DynamicCache, int]:
        """A cache with the beginning of the prompt, and its tokens; at least one is left to read."""
        with self.lock:
            best, length = None, 0
            for entry in self.caches:
                common = shared_beginning(entry[1], prompt[:-1]) if entry[0] == active_adapters else 0
                if common > length:
                    best, length = entry, common
            if best is None:
                return self.new_cache(), 0
            self.caches.remove(best)
        _, ids, cache = best
        if length < len(ids):
            cache.crop(length - len(ids))
        return cache, length

    def keep(self, ids: list[int], cache: DynamicCache, active_adapters: ActiveAdapters) -> None:
        """Keep a cache for the next turn of its conversation, if it can be cut to a beginning of it."""
        if not all(_can_be_cut(layer) for layer in cache.layers):
            return
        ids = ids[: cache.get_seq_length()]
        if ids:
            joined_caches.let_go(cache)
            with self.lock:
                if self.model is not None:  # a closed engine answers no further question
                    self.caches = [*self.caches, (active_adapters, ids, cache)][-KEPT:]


class Sequence:
    """One answer's use of the engine: an engine.Sequence."""

    def __init__(self, engine: Engine, prompt: list[int], active_adapters: ActiveAdapters):
        self.engine, self.prompt, self.active_adapters = engine, prompt, active_adapters
        self.cache, self.reused = engine.take(prompt, active_adapters)
        self.rows: list[list[int]] = [[]]  # tokens after the prompt, for each beam
        self.scores: torch.Tensor | None = None
        self.cancelled = self.closed = False
        self.whole = True  # False after an error within a step, when some layers have read more than others
        self.slot = Slot(0, mixture_of(active_adapters), is_open=True)

    def read(self) -> Iterator[int]:
        place = self.reused
        while place < len(self.prompt):
            if self.cancelled:
                return
            place += self._step(self.prompt[place : place + CHUNK])
            yield place

    def _step(self, ids: list[int]) -> int:
        """Add these ids, or with other sequences as many as there is room for; returns how many."""
        batching = self.engine.batching
        if batching is None:
            self.add(ids)
            return len(ids)
        if self.slot not in self.engine.sequences:
            with self.engine.lock:
                self.engine.sequences = {**self.engine.sequences, self.slot: self}
        return batching.step(Step(self.engine, self.slot, ids, memoryview(b"")))

    def add(self, ids: list[int]) -> None:
        """One step of this sequence alone, which has one row."""
        self.whole = False
        self.scores = self.engine.scores([ids], self.cache, self.active_adapters)
        self.whole = True

    def first(self) -> torch.Tensor:
        self._check_goes_on()
        assert self.scores is not None, "read() comes first"
        return self.scores

    def advance(self, parents: abc.Sequence[int], tokens: abc.Sequence[int]) -> torch.Tensor:
        self._check_goes_on()
        if self.engine.batching and len(self.rows) == len(tokens) == 1:
            self._step(list(tokens))
            self.rows = [[*self.rows[0], *tokens]]
            assert self.scores is not None
            return self.scores
        self._leave_batching()  # beams have steps of their own
        self.whole = False
        if list(parents) != list(range(len(self.rows))):
            self.cache.batch_select_indices(torch.tensor(parents, device=self.engine.device))
        self.rows = [[*self.rows[p], token] for p, token in zip(parents, tokens, strict=True)]
        scores = self.engine.scores([[token] for token in tokens], self.cache, self.active_adapters)
        self.whole = True
        return scores

    def cancel(self) -> None:
        self.cancelled = True
        if self.engine.batching:
            self.engine.batching.withdraw(self.slot, RuntimeError("The sequence was cancelled."))

    def _leave_batching(self) -> None:
        """Let no batch wait for this sequence."""
        if self.engine.batching:
            with self.engine.lock:
                others = self.engine.sequences.items()
                self.engine.sequences = {slot: one for slot, one in others if slot is not self.slot}
            self.engine.batching.close(self.slot, 0)

    def _check_goes_on(self) -> None:
        if self.cancelled or self.closed:
            raise RuntimeError("The sequence was cancelled or closed.")

    def close(self) -> None:
        """Give keys and values back to the engine, for the next turn of this conversation."""
        closed, self.closed = self.closed, True
        self._leave_batching()
        if self.whole and not closed:
            if len(self.rows) > 1:
                self.cache.batch_select_indices(torch.tensor([0], device=self.engine.device))
            self.engine.keep([*self.prompt, *self.rows[0]], self.cache, self.active_adapters)


def _can_be_cut(layer: Any) -> bool:
    """Whether a layer of a cache can drop its last tokens; a sliding window that moved lost older ones."""
    moved = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window
    return getattr(layer, "is_croppable", False) and not moved


def _is_an_engine(engine: Engine) -> inference_engine.Engine:
    """For the type checker alone."""
    return engine
