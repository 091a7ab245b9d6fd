"""Which tokens each sequence of a llama.cpp context holds, and which one a new prompt gets.

A slot is one sequence of the context. It keeps the keys and values of an answer until another prompt needs
its place. They belong to the mixture of adapters that computed them: a prompt that is read with another
mixture never gets them, although it may begin with the same tokens.

This file only keeps account. The engine cuts and copies in llama.cpp what it says.
"""

import dataclasses
from collections.abc import Sequence

from onecard.config.generation import ActiveAdapters
from onecard.inference.decoding import shared_beginning

Mixture = tuple[tuple[str, float], ...]  # sorted; adapters of weight 0 are left out


def mixture_of(active_adapters: ActiveAdapters) -> Mixture:
    """The same value for all ways to write one mixture of adapters."""
    weights = dict(active_adapters)
    return tuple(sorted((name, float(weight)) for name, weight in weights.items() if weight))


@dataclasses.dataclass(eq=False)
class Slot:
    """One sequence of a context."""

    number: int
    mixture: Mixture = ()
    ids: list[int] = dataclasses.field(default_factory=list)  # tokens whose keys and values it holds
    is_open: bool = False  # whether an answer uses it
    is_stale: bool = False  # whether a step failed, or its contents are to be forgotten
    answers: bool = False  # whether the prompt has been read, so that it asks for one token after the other
    is_late: bool = False  # whether a batch went without it, and it has not asked since
    closed: int = 0  # when it was closed last, as a number that grows


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a new prompt is read."""

    slot: Slot
    source: Slot  # that holds the beginning of the prompt; it may be `slot`
    keep: int  # tokens of that beginning; 0: nothing can be used again


def place_for(prompt: list[int], mixture: Mixture, slots: Sequence[Slot]) -> Place | None:
    """The slot for a new prompt, and where its beginning may come from; None when all slots are open.

    At least one token of the prompt is left to be read, since its scores are needed. The slot that was closed
    first loses what it holds; one that the prompt continues is used itself.
    """
    free = [slot for slot in slots if not slot.is_open]
    if not free:
        return None
    held = [slot for slot in slots if slot.mixture == mixture and not slot.is_stale]
    shared = {slot: shared_beginning(slot.ids, prompt[:-1]) for slot in held}
    source = max(held, key=lambda slot: (shared[slot], not slot.is_open, slot.closed), default=free[0])
    keep = shared.get(source, 0)
    # a slot of which less than half would stay is of another conversation, which may go on
    if not source.is_open and keep and 2 * keep >= len(source.ids):
        return Place(source, source, keep)
    others = [slot for slot in free if slot is not source] or free
    slot = min(others, key=lambda slot: (bool(slot.ids) and not slot.is_stale, slot.closed))
    return Place(slot, source if keep else slot, keep)
