"""Conversations become examples in files; the order of examples is a pure function of (seed, epoch).

Rows come one at a time. Their token ids go to flat files that are mapped, so memory does not grow with them.
This file knows no formats, templates or models: the function that encodes is passed in.
"""

import dataclasses
import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from onecard.data.conversation import Conversation
from onecard.data.schemas import BadRow
from onecard.errors import DATA, UserError
from onecard.system import hashing

Encoded = tuple[list[int], list[bool], bool]  # ids, is_target, whether something was cut off
Encode = Callable[[list[Conversation], list[int]], list[Encoded | BadRow]]  # takes rows and their numbers
BATCH, BATCH_TEXT = 256, 1 << 20  # rows and characters that are encoded at a time
FIELDS = {  # of Examples; each is a file
    "ids": np.int32,
    "is_target": np.bool_,
    "offsets": np.int64,
    "numbers": np.int64,
    "target_counts": np.int32,
    "hashes": np.uint64,
}
RECORD = "encoding.json"  # written last, so a folder that has it is complete


@dataclasses.dataclass
class Examples:
    """N encoded rows in flat arrays that are mapped from files. Row i is ids[offsets[i]:offsets[i+1]]."""

    ids: np.ndarray  # int32 [sum of T]
    is_target: np.ndarray  # bool [sum of T]
    offsets: np.ndarray  # int64 [N+1]
    numbers: np.ndarray  # int64 [N], number of the row over all files, counted from 1
    target_counts: np.ndarray  # int32 [N], number of target tokens in each row
    hashes: np.ndarray  # uint64 [N], equal for rows with equal ids

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """ids [T] and is_target [T] of one row."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.is_target[part]

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N], tokens of each row."""
        return np.diff(self.offsets)


@dataclasses.dataclass
class Encoding:
    """Examples, and what happened to the rows: rows read = examples + dropped + rejected."""

    examples: Examples
    sha256: str  # of all ids, targets and offsets: of what the model will see
    read: int
    cut: int  # rows that were longer than --cutoff_len
    dropped: int  # rows with no target left after the cut
    rejected: list[BadRow]


class Writer:
    """Writes examples to a folder row by row, so that memory does not grow with their number."""

    def __init__(self, folder: Path):
        self.folder, self.digest, self.end = folder, hashlib.sha256(), 0
        self.digests = {name: hashlib.sha256() for name in FIELDS}
        self.files = {name: open(folder / name, "wb") for name in FIELDS}  # noqa: SIM115 (closed in finish)
        self._put("offsets", array("q", [0]).tobytes())

    def add(self, number: int, ids: list[int], is_target: list[bool]) -> None:
        """Write one row: its number, and its ids and is_target flags of equal length."""
        raw = array("i", ids).tobytes()
        self.end += len(ids)
        self._put("ids", raw)
        self._put("is_target", bytes(is_target))
        self._put("offsets", array("q", [self.end]).tobytes())
        self._put("numbers", array("q", [number]).tobytes())
        self._put("target_counts", array("i", [sum(is_target)]).tobytes())
        self._put("hashes", hashlib.blake2b(raw, digest_size=8).digest())

    def _put(self, name: str, raw: bytes) -> None:
        self.files[name].write(raw)
        self.digests[name].update(raw)
        if name in ("ids", "is_target", "offsets"):
            self.digest.update(raw)

    def finish(self, read: int, rejected: list[BadRow], cut: int = 0, dropped: int = 0) -> Encoding:
        """Close the files, write the record, and map what was written."""
        for file in self.files.values():
            file.close()
        sizes = {name: (self.folder / name).stat().st_size for name in FIELDS}
        counts = {"read": read, "cut": cut, "dropped": dropped, "rejected": rejected}
        digests = {name: digest.hexdigest() for name, digest in self.digests.items()}
        record = {**counts, "sha256": self.digest.hexdigest(), "bytes": sizes, "files": digests}
        text = json.dumps(record, default=dataclasses.asdict)
        (self.folder / RECORD).write_text(text, encoding="utf-8", errors="surrogatepass")
        return load(self.folder)


def load(folder: Path, verify: bool = False) -> Encoding | None:
    """The encoding that a Writer wrote to a folder; None when it is not complete.

    verify: also compare the hash of every file.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8", errors="surrogatepass"))
        if any((folder / name).stat().st_size != record["bytes"][name] for name in FIELDS):
            return None
        if verify and any(hashing.sha256(folder / name) != record["files"][name] for name in FIELDS):
            return None
        examples = Examples(**{name: _mapped(folder / name, dtype) for name, dtype in FIELDS.items()})
        rejected = [BadRow(**row) for row in record["rejected"]]
        counts = {name: record[name] for name in ("sha256", "read", "cut", "dropped")}
        return Encoding(examples, rejected=rejected, **counts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _mapped(path: Path, dtype: type) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def encode_rows(rows: Iterable[Conversation | BadRow], encode: Encode, folder: Path) -> Encoding:
    """Encode rows into a folder. Rows without a target are dropped, bad rows are listed as rejected."""
    writer, rejected = Writer(folder), []
    number = cut = dropped = 0
    for number, row in _encode_in_batches(rows, encode):
        if isinstance(row, BadRow):
            rejected.append(row)
            continue
        ids, is_target, was_cut = row
        cut += was_cut
        if any(is_target):
            writer.add(number, ids, is_target)
        else:
            dropped += 1
    return writer.finish(number, rejected, cut, dropped)


def encode_documents(
    rows: Iterable[Conversation | BadRow],
    encode: Encode,
    length: int,
    overlap: int,
    borders: Callable[[int], bool],
    folder: Path,
) -> Encoding:
    """Encode documents one after the other and cut them into blocks of `length` tokens; the last is shorter.

    A document that continues in the next block repeats its last `overlap` tokens there; they are not targets.
    borders(number): whether no block may hold both row `number` and rows before it. A block has the number of
    the row in which it begins.
    """
    assert overlap < length
    writer, rejected = Writer(folder), []
    ids: list[int] = []
    is_target: list[bool] = []
    row_numbers: list[int] = []  # of the row that each token comes from
    number = 0

    def put(start: int, end: int) -> int:
        """Write the block of tokens start to end; returns where the next one starts."""
        flags = [False, *is_target[start + 1 : end]]  # nothing comes before the first token
        if any(flags):
            writer.add(row_numbers[start], ids[start:end], flags)
        repeated = min(overlap, end - start) if len(ids) > end else 0
        while repeated and row_numbers[end - repeated] != row_numbers[end]:
            repeated -= 1  # these tokens belong to the document before
        is_target[end - repeated : end] = [False] * repeated
        return end - repeated

    def put_blocks(down_to: int) -> None:
        """Write blocks until no more than `down_to` tokens wait."""
        start = 0
        while len(ids) - start > down_to:
            start = put(start, min(start + length, len(ids)))
        for waiting in (ids, is_target, row_numbers):
            del waiting[:start]

    for number, row in _encode_in_batches(rows, encode):
        if ids and borders(number):
            put_blocks(0)
        if isinstance(row, BadRow):
            rejected.append(row)
            continue
        ids += row[0]
        is_target += row[1]
        row_numbers += [number] * len(row[0])
        put_blocks(length)
    put_blocks(0)
    return writer.finish(number, rejected)


def _encode_in_batches(
    rows: Iterable[Conversation | BadRow], encode: Encode
) -> Iterator[tuple[int, Encoded | BadRow]]:
    """The number of each row, and its encoding or why it has none, in the order of the rows."""
    for batch in _batches(enumerate(rows, start=1)):
        good = [(number, row) for number, row in batch if not isinstance(row, BadRow)]
        encoded = iter(encode([row for _, row in good], [number for number, _ in good]))
        for number, row in batch:
            yield number, row if isinstance(row, BadRow) else next(encoded)


def _batches(rows: Iterator[tuple[int, Conversation | BadRow]]) -> Iterator[list]:
    """Rows with their numbers, some at a time: fewer when they are long."""
    batch, size = [], 0
    for number, row in rows:
        batch.append((number, row))
        size += 0 if isinstance(row, BadRow) else sum(len(turn.text) for turn in row.turns)
        if len(batch) == BATCH or size > BATCH_TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def repeated(indices: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Each index as often as its weight says; the seed chooses which indices a fraction repeats once more."""
    whole = np.floor(weights).astype(np.int64)
    draws = np.random.default_rng([seed, 0x3E16]).random(len(indices))
    return np.repeat(indices, whole + (draws < weights - whole))


def split(count: int, test_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training rows and of the validation rows: a pure function of the arguments.

    A test_size of 0 takes none; below 1 it is a fraction of the rows, at least 1 and at most 200 rows; from 1
    on it is a number of rows. Raises UserError (exit 3) when no training row would be left.
    """
    validation = int(test_size)
    if 0 < test_size < 1:
        validation = min(max(1, round(count * test_size)), 200)
    if validation >= count:
        raise UserError(
            f"--test_size {test_size:g} asks for {validation} of {count} usable rows.",
            "Leave some to train on; --test_size 0 takes none.",
            DATA,
        )
    order = np.random.default_rng([seed, 0x5EED]).permutation(count)
    return np.sort(order[validation:]), order[:validation]


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps in which an epoch of so many rows is trained; the last one may be smaller."""
    return -(-rows // batch_size)


def rows_at(seed: int, rows_seen: int, batch_size: int, count: int) -> np.ndarray:
    """Indices (0..count-1) of the rows of the optimizer step that starts after `rows_seen` rows.

    A pure function: any step of any epoch can be computed without those before it. A step never goes beyond
    the end of an epoch; the last step of an epoch may be smaller.
    """
    epoch, position = divmod(rows_seen, count)
    return _order(seed, epoch, count)[position : position + batch_size]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
