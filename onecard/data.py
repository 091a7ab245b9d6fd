"""Conversations -> examples; the order of examples as a pure function of (seed, epoch).

Rows come one at a time and are kept as token ids in flat arrays, never as a second copy of the texts. This
file does not know files' formats, templates or models: encoding is passed in.
"""

import dataclasses
import functools
import hashlib
from array import array
from collections.abc import Callable, Iterable

import numpy as np

from onecard.errors import DATA, UserError
from onecard.prompt import Conversation
from onecard.reader import BadRow

Encode = Callable[[Conversation], tuple[list[int], list[bool]]]


@dataclasses.dataclass
class Examples:
    """N encoded rows in flat arrays: row i is ids[offsets[i]:offsets[i+1]]."""

    ids: np.ndarray  # int32 [sum of T]
    is_target: np.ndarray  # bool [sum of T]
    offsets: np.ndarray  # int64 [N+1]
    numbers: np.ndarray  # int64 [N], place of the row in its file, counted from 1

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.is_target[part]

    def sha256(self) -> str:
        """Of all ids, targets and borders: what the model will see."""
        digest = hashlib.sha256()
        for array_ in (self.ids, self.is_target, self.offsets):
            digest.update(np.ascontiguousarray(array_).data)
        return digest.hexdigest()

    @functools.cached_property
    def lengths(self) -> np.ndarray:  # tokens of each row [N]
        return np.diff(self.offsets)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:  # target tokens of each row [N]
        counts = np.concatenate([[0], np.cumsum(self.is_target, dtype=np.int64)])
        return counts[self.offsets[1:]] - counts[self.offsets[:-1]]


@dataclasses.dataclass
class Encoding:
    """Examples and what happened to the rows on the way: rows read = kept + dropped + rejected."""

    examples: Examples
    cut: int = 0  # rows longer than cutoff_len, cut at the right
    dropped: int = 0  # rows with no target left after the cut
    rejected: list[BadRow] = dataclasses.field(default_factory=list)


def encode_rows(rows: Iterable[Conversation | BadRow], encode: Encode, cutoff_len: int) -> Encoding:
    """Encode rows, cut them at cutoff_len tokens, drop those with no target left; bad rows are collected."""
    ids, is_target, offsets, numbers = array("i"), array("b"), array("q", [0]), array("q")
    result = Encoding(Examples(*[np.empty(0)] * 4))
    for number, row in enumerate(rows, start=1):
        if isinstance(row, BadRow):
            result.rejected.append(row)
            continue
        row_ids, row_targets = encode(row)
        result.cut += len(row_ids) > cutoff_len
        row_ids, row_targets = row_ids[:cutoff_len], row_targets[:cutoff_len]
        if not any(row_targets):
            result.dropped += 1
            continue
        ids.extend(row_ids)
        is_target.extend(row_targets)
        offsets.append(len(ids))
        numbers.append(number)
    flags = np.frombuffer(is_target, dtype=np.bool_) if is_target else np.empty(0, np.bool_)
    result.examples = Examples(
        _view(ids, np.int32), flags, _view(offsets, np.int64), _view(numbers, np.int64)
    )
    return result


def split(count: int, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of (training, validation) rows, a pure function of its arguments.

    test_size below 1 is a fraction, giving at least 1 and at most 200 rows; otherwise a number of rows.
    Raises UserError (exit 3) when no training row would be left.
    """
    validation = int(test_size)
    if 0 < test_size < 1:
        validation = min(max(1, round(count * test_size)), 200)
    if validation >= count:
        raise UserError(
            f"--test_size {test_size:g} asks for {validation} of {count} usable rows.",
            "Leave some to train on.",
            DATA,
        )
    order = np.random.default_rng([seed, 0x5EED]).permutation(count)
    return np.sort(order[validation:]), order[:validation]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    return -(-rows // batch_size)


def rows_at(seed: int, rows_seen: int, batch_size: int, count: int) -> np.ndarray:
    """Places (0..count-1) of the rows of the optimizer step that starts after `rows_seen` rows.

    A pure function: any step of any epoch can be computed without the ones before. A step never crosses the
    end of an epoch; the last one may be smaller.
    """
    epoch, position = divmod(rows_seen, count)
    return _order(seed, epoch, count)[position : position + batch_size]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _view(values: array, dtype: type) -> np.ndarray:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.empty(0, dtype)
