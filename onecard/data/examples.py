"""Conversations -> examples; the order of examples as a pure function of (seed, epoch).

Rows come one at a time and go to flat files of token ids, which are mapped, never held. This file knows no
formats, templates or models: encoding is passed in.
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

Encoded = tuple[list[int], list[bool], bool]  # ids, is_target, was something cut
Encode = Callable[[list[Conversation], list[int]], list[Encoded | BadRow]]  # rows and their numbers
BATCH, BATCH_TEXT = 256, 1 << 20  # rows, characters that are encoded at a time
FIELDS = {  # of Examples, each a file of its own
    "ids": np.int32,
    "is_target": np.bool_,
    "offsets": np.int64,
    "numbers": np.int64,
    "target_counts": np.int32,
    "hashes": np.uint64,
}
RECORD = "encoding.json"  # written last: the folder is whole


@dataclasses.dataclass
class Examples:
    """N encoded rows in flat arrays mapped from files: row i is ids[offsets[i]:offsets[i+1]]."""

    ids: np.ndarray  # int32 [sum of T]
    is_target: np.ndarray  # bool [sum of T]
    offsets: np.ndarray  # int64 [N+1]
    numbers: np.ndarray  # int64 [N], place of the row in its files, counted from 1
    target_counts: np.ndarray  # int32 [N], target tokens of each row
    hashes: np.ndarray  # uint64 [N], equal for rows with equal ids

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[part], self.is_target[part]

    @functools.cached_property
    def lengths(self) -> np.ndarray:  # tokens of each row [N]
        return np.diff(self.offsets)


@dataclasses.dataclass
class Encoding:
    """Examples and what happened to the rows on the way: rows read = used + dropped + rejected."""

    examples: Examples
    sha256: str  # of all ids, targets and borders: what the model will see
    read: int
    cut: int  # rows that lost something to cutoff_len
    dropped: int  # rows with no target left after the cut
    rejected: list[BadRow]


class Writer:
    """Writes examples to a folder, row by row, so that memory stays flat however many there are."""

    def __init__(self, folder: Path):
        self.folder, self.digest, self.end = folder, hashlib.sha256(), 0
        self.digests = {name: hashlib.sha256() for name in FIELDS}
        self.files = {name: open(folder / name, "wb") for name in FIELDS}  # noqa: SIM115 (closed in done)
        self._put("offsets", array("q", [0]).tobytes())

    def add(self, number: int, ids: list[int], is_target: list[bool]) -> None:
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

    def done(self, read: int, rejected: list[BadRow], cut: int = 0, dropped: int = 0) -> Encoding:
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
    """What a Writer left in a folder, mapped; None when it is not whole. verify: compare every byte."""
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
    """Encode rows into a folder and drop those with no target; bad rows are collected."""
    writer, rejected = Writer(folder), []
    number = cut = dropped = 0
    for number, made in _encoded(rows, encode):
        if isinstance(made, BadRow):
            rejected.append(made)
            continue
        ids, is_target, was_cut = made
        cut += was_cut
        if any(is_target):
            writer.add(number, ids, is_target)
        else:
            dropped += 1
    return writer.done(number, rejected, cut, dropped)


def encode_documents(
    rows: Iterable[Conversation | BadRow],
    encode: Encode,
    length: int,
    overlap: int,
    borders: Callable[[int], bool],
    folder: Path,
) -> Encoding:
    """Documents one after the other, cut into blocks of exactly `length` tokens, the last one shorter.

    A document that goes on in the next block repeats its last `overlap` tokens there, untrained. No block
    holds rows from both sides of a border: borders(number) tells whether one lies before that row. A block
    has the number of the row in which it begins.
    """
    assert overlap < length
    writer, rejected = Writer(folder), []
    ids: list[int] = []
    is_target: list[bool] = []
    places: list[int] = []  # the row that each token comes from
    number = 0

    def put(start: int, end: int) -> int:
        """Write the block; returns where the next one starts."""
        flags = [False, *is_target[start + 1 : end]]  # nothing comes before the first token
        if any(flags):
            writer.add(places[start], ids[start:end], flags)
        again = min(overlap, end - start) if len(ids) > end else 0
        while again and places[end - again] != places[end]:
            again -= 1  # another document's end is no beginning of this one
        is_target[end - again : end] = [False] * again
        return end - again

    def put_blocks(down_to: int) -> None:
        """Write blocks until no more than `down_to` tokens wait."""
        start = 0
        while len(ids) - start > down_to:
            start = put(start, min(start + length, len(ids)))
        for kept in (ids, is_target, places):
            del kept[:start]

    for number, made in _encoded(rows, encode):
        if ids and borders(number):
            put_blocks(0)
        if isinstance(made, BadRow):
            rejected.append(made)
            continue
        ids += made[0]
        is_target += made[1]
        places += [number] * len(made[0])
        put_blocks(length)
    put_blocks(0)
    return writer.done(number, rejected)


def _encoded(rows: Iterable[Conversation | BadRow], encode: Encode) -> Iterator[tuple[int, Encoded | BadRow]]:
    """(number, what became of the row) for all rows in their order."""
    for batch in _batches(enumerate(rows, start=1)):
        good = [(number, row) for number, row in batch if not isinstance(row, BadRow)]
        made = iter(encode([row for _, row in good], [number for number, _ in good]))
        for number, row in batch:
            yield number, row if isinstance(row, BadRow) else next(made)


def _batches(rows: Iterator[tuple[int, Conversation | BadRow]]) -> Iterator[list]:
    """A few rows at a time, fewer when they are long."""
    batch, size = [], 0
    for number, row in rows:
        batch.append((number, row))
        size += 0 if isinstance(row, BadRow) else sum(len(turn.text) for turn in row.turns)
        if len(batch) == BATCH or size > BATCH_TEXT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def repeated(places: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Places as often as their weights say; of a fraction, rows that the seed chooses once."""
    whole = np.floor(weights).astype(np.int64)
    luck = np.random.default_rng([seed, 0x3E16]).random(len(places))
    return np.repeat(places, whole + (luck < weights - whole))


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
            "Leave some to train on; --test_size 0 takes none.",
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
