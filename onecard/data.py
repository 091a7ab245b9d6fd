"""Files -> conversations -> examples; the order of examples as a pure function of (seed, epoch).

Rows are read one at a time and kept as token ids in flat arrays, never as a second copy of the texts. This
file does not know templates or models: encoding is passed in.
"""

import dataclasses
import functools
import hashlib
import io
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from onecard.errors import DATA, UserError
from onecard.prompt import Conversation

CHUNK = 1 << 20  # characters read at a time
LONGEST_ROW = 64 << 20  # characters; anything longer is a mistake in the file
Encode = Callable[[Conversation], tuple[list[int], list[bool]]]


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it starts to be wrong, why, and its text."""

    line: int
    column: int
    reason: str
    text: str

    def describe(self, path: Path) -> str:
        excerpt = " ".join(self.text[:80].split())
        return f"{path}:{self.line}:{self.column}: {self.reason}; near: {excerpt!r}"


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

    @property
    def lengths(self) -> np.ndarray:  # tokens of each row [N]
        return np.diff(self.offsets)

    @property
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


def read_rows(path: str | Path) -> Iterator[Conversation | BadRow]:
    """Stream the rows of a JSON array or JSONL file of {instruction, input, output}.

    Raises UserError (exit 3) when there is no such file, it is empty, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--data_path {path}: no such file.", "Name a JSON or JSONL file of rows.", DATA)
    try:
        with path.open("rb") as raw:
            if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: UTF-16 text.", "Save it as UTF-8.", DATA)
        # bytes that are not UTF-8 become lone surrogates, which _conversation reports by line
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            start = _first_character(file, path)
            values = _array_values(file) if start == "[" else _line_values(file)
            for line, column, value, text in values:
                yield value if isinstance(value, BadRow) else _conversation(value, line, column, text)
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}.", "Check the rights of the file.", DATA) from None


def pick_rows(path: str | Path, numbers: list[int]) -> list[Conversation]:
    """The rows with these numbers (counted from 1), read again, in the order of `numbers`."""
    wanted = set(numbers)
    rows = islice(read_rows(path), max(wanted, default=0))
    found = {number: row for number, row in enumerate(rows, start=1) if number in wanted}
    return [found[number] for number in numbers]


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


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _view(values: array, dtype: type) -> np.ndarray:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.empty(0, dtype)


def _first_character(file: io.TextIOBase, path: Path) -> str:
    head = file.read(CHUNK).lstrip()
    file.seek(0)
    if not head:
        raise UserError(
            f"{path}: the file is empty.", "It should hold rows of {instruction, input, output}.", DATA
        )
    if head[0] not in "[{":
        problem = f"{path}:1:1: neither a JSON array nor JSONL; it begins with {head[:20]!r}."
        raise UserError(
            problem, 'A row looks like {"instruction": "...", "input": "", "output": "..."}.', DATA
        )
    return head[0]


def _line_values(file: Iterable[str]) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each line of a JSONL file."""
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            yield line, 1, _DECODER.decode(text.rstrip()), text
        except ValueError as error:
            column = getattr(error, "colno", 1)
            yield line, column, BadRow(line, column, _reason(error), text[max(0, column - 40) :]), text
        except RecursionError:
            yield line, 1, BadRow(line, 1, "nested too deeply", text), text


def _array_values(file: io.TextIOBase) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each element of a JSON array, read in pieces."""
    window = _Window(file)
    window.skip(_BLANK)
    window.advance(1)  # the opening bracket
    first = True
    while True:
        window.skip(_BLANK)
        lost = False
        if window.peek() == "]":
            window.advance(1)
            window.skip(_BLANK)
            if window.peek():
                yield *window.place(), window.bad("text after the closing bracket", window.position), ""
            return
        if not window.peek():
            yield *window.place(), window.bad("the file ends before the closing bracket", window.position), ""
            return
        if not first:
            if window.peek() != ",":
                yield *window.place(), window.bad("a comma is missing between two rows", window.position), ""
                lost = True
            else:
                window.advance(1)
            window.skip(_BLANK)
        first = False
        line, column = window.place()
        try:
            value, end = window.decode()
        except ValueError as error:
            bad = window.bad(_reason(error), getattr(error, "pos", window.position))
            skipped = window.to_next_row()
            if not lost:
                yield line, column, bad, ""
            first = True  # to_next_row has already passed the comma
            if not skipped:
                return
            continue
        text = window.text[window.position : min(end, window.position + 200)]
        window.advance(end - window.position)
        if not lost:
            yield line, column, value, text


class _Window:
    """A part of a text file that moves forward: `position` is where the next value is looked for."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.position, self.ended = file, "", 0, False
        self.line, self.column = 1, 1  # of `position`

    def more(self) -> bool:
        if len(self.text) - self.position > LONGEST_ROW:
            raise ValueError(f"a row of more than {LONGEST_ROW >> 20} million characters")
        self._forget()
        piece = "" if self.ended else self.file.read(max(CHUNK, len(self.text)))
        self.ended = not piece
        self.text += piece
        return not self.ended

    def _forget(self) -> None:
        self.text, self.position = self.text[self.position :], 0

    def peek(self) -> str:
        while self.position >= len(self.text) and self.more():
            pass
        return self.text[self.position : self.position + 1]

    def skip(self, pattern: re.Pattern) -> None:
        while self.peek() and pattern.match(self.text, self.position):
            self.advance(1)

    def advance(self, count: int) -> None:
        self.line, self.column = self.place(self.position + count)
        self.position += count
        if self.position > CHUNK:
            self._forget()

    def place(self, position: int | None = None) -> tuple[int, int]:
        """(line, column), both counted from 1, of a position that is not behind `self.position`."""
        ahead = self.text[self.position : position] if position is not None else ""
        newlines = ahead.count("\n")
        return self.line + newlines, len(ahead) - ahead.rfind("\n") if newlines else self.column + len(ahead)

    def decode(self) -> tuple[Any, int]:
        """The JSON value at `position` and where it ends; reads on while the value may be incomplete."""
        while True:
            try:
                before = self.position
                value, end = _DECODER.raw_decode(self.text, before)
                # a number at the border may go on behind it
                if end < len(self.text) - 2 or not isinstance(value, int | float) or not self.more():
                    return value, end - before + self.position
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                before = self.position
                if not unfinished or not self.more():
                    error.pos += self.position - before
                    raise
            except RecursionError:
                raise ValueError("nested too deeply") from None

    def bad(self, reason: str, position: int) -> BadRow:
        position = min(position, len(self.text))
        return BadRow(
            *self.place(position), reason, self.text[max(self.position, position - 40) : position + 80]
        )

    def to_next_row(self) -> bool:
        """Move to what looks like the start of the next row: a brace after a closing brace and a comma."""
        while True:
            found = _NEXT_ROW.search(self.text, self.position)
            if found:
                self.advance(found.end() - self.position)
                return True
            try:
                if not self.more():
                    return False
            except ValueError:
                return False


def _conversation(value: Any, line: int, column: int, text: str) -> Conversation | BadRow:
    if not isinstance(value, dict):
        return BadRow(line, column, f"a row must be an object, this is {_kind(value)}", text)
    for key in ("instruction", "output"):
        if key not in value:
            return BadRow(line, column, f"the row has no {key!r}", text)
    fields = {
        "instruction": value["instruction"],
        "input": "" if value.get("input") is None else value["input"],
        "output": value["output"],
    }
    for key, field in fields.items():
        if not isinstance(field, str):
            return BadRow(line, column, f"{key!r} must be text, this is {_kind(field)}", text)
        if _SURROGATE.search(field):
            return BadRow(line, column, f"{key!r} holds bytes that are not UTF-8 or half a \\u pair", text)
    if not fields["instruction"].strip():
        return BadRow(line, column, "'instruction' is empty", text)
    return Conversation(**fields)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: ValueError) -> str:
    return f"broken JSON, {error.msg.lower()}" if isinstance(error, json.JSONDecodeError) else str(error)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_BLANK = re.compile(r"[ \t\r\n]")
_NEXT_ROW = re.compile(r"\}\s*,\s*(?=\{)")
_SURROGATE = re.compile("[\ud800-\udfff]")
