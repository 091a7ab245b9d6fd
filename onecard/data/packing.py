"""The examples of one optimizer step, packed into micro-batches of at most so many tokens.

How rows are packed does not change the gradient (docs/decisions.md, "The optimizer step is the unit").
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from onecard.data.examples import Examples


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Several rows as one sequence of T tokens, N of which are targets."""

    input_ids: torch.Tensor  # int64 [1, T]
    position_ids: torch.Tensor  # int64 [1, T], starting at 0 in each document
    document_lengths: tuple[int, ...]  # in tokens; their sum is T
    predicts: torch.Tensor  # int64 [N], the position before each target: its hidden state predicts it
    targets: torch.Tensor  # int64 [N]
    row_numbers: tuple[int, ...]  # numbers of the rows in their file, for messages

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch on another device."""
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        return dataclasses.replace(self, **tensors)


_TENSORS = ("input_ids", "position_ids", "predicts", "targets")


def plan(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of rows in groups of at most `budget` tokens; a row that is longer is a group of its own.

    First-fit decreasing: the longest row comes first, and each row goes into the first group with room.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = int(lengths[index])
        group = next((g for g, free in enumerate(room) if free >= length), None)
        if group is None:
            groups.append([])
            room.append(budget)
            group = len(groups) - 1
        groups[group].append(index)
        room[group] -= length
    return groups


def pack(examples: Examples, rows: Sequence[int]) -> PackedBatch:
    """Concatenate rows of `examples` into one packed batch."""
    parts = [examples[row] for row in rows]
    lengths = tuple(len(ids) for ids, _ in parts)
    ids = np.concatenate([ids for ids, _ in parts]).astype(np.int64)
    is_target = np.concatenate([flags for _, flags in parts])
    positions = np.flatnonzero(is_target)  # [N]; none is 0, because a row's first token is never a target
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        document_lengths=lengths,
        predicts=torch.from_numpy(positions - 1),
        targets=torch.from_numpy(ids[positions]),
        row_numbers=tuple(int(examples.numbers[row]) for row in rows),
    )


def micro_batches(
    examples: Examples, rows: Sequence[int], budget: int, rank: int = 0, world: int = 1
) -> list[PackedBatch]:
    """This process's share of the rows of one optimizer step, packed under a budget of tokens.

    rows: indices in `examples`, the same in all `world` processes; rank: number of this process. The list is
    empty when there are fewer rows than processes.
    """
    lengths = examples.lengths
    # every process gets long and short rows, so that all have about the same work
    share = sorted(rows, key=lambda row: (-lengths[row], row))[rank::world]
    return [
        pack(examples, [share[i] for i in group]) for group in plan([lengths[row] for row in share], budget)
    ]
