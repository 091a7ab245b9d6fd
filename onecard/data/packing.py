"""Examples of one optimizer step -> packed micro-batches under a token budget.

How rows are packed does not change the gradient (docs/decisions.md, "The optimizer step is the unit").
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from onecard.data.examples import Examples


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Several rows one after the other as a single sequence of T tokens, N of them targets."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], from 0 in every document
    document_lengths: tuple[int, ...]  # adds up to T
    predicts: torch.Tensor  # int64 [N], places whose hidden state predicts a target: the token before it
    targets: torch.Tensor  # int64 [N]
    row_numbers: tuple[int, ...]  # of the rows in their file, for messages

    def to(self, device: torch.device) -> "PackedBatch":
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return dataclasses.replace(self, **moved)


_TENSORS = ("input_ids", "position_ids", "predicts", "targets")


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Places of rows grouped so that no group holds more than `budget` tokens; a longer row stands alone.

    First-fit decreasing: longest row first, each into the first group with room.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[place])
        group = next((g for g, free in enumerate(room) if free >= length), None)
        if group is None:
            groups.append([])
            room.append(budget)
            group = len(groups) - 1
        groups[group].append(place)
        room[group] -= length
    return groups


def pack(examples: Examples, rows: Sequence[int]) -> PackedBatch:
    """Concatenate rows of `examples` into one packed batch."""
    parts = [examples[row] for row in rows]
    lengths = tuple(len(ids) for ids, _ in parts)
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    places = np.flatnonzero(
        np.concatenate([flags for _, flags in parts])
    )  # [N], a first token is never a target
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        document_lengths=lengths,
        predicts=torch.from_numpy(places - 1),
        targets=torch.from_numpy(ids[places]),
        row_numbers=tuple(int(examples.numbers[row]) for row in rows),
    )


def micro_batches(
    examples: Examples, rows: Sequence[int], budget: int, rank: int = 0, world: int = 1
) -> list[PackedBatch]:
    """This process's share of the rows of one optimizer step, packed; empty when there are too few rows."""
    lengths = examples.lengths
    share = sorted(rows, key=lambda row: (-lengths[row], row))[rank::world]  # similar work for every process
    return [
        pack(examples, [share[i] for i in group]) for group in plan([lengths[row] for row in share], budget)
    ]
