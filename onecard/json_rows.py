"""JSON arrays and JSONL -> values, one at a time, with the place of whatever is wrong.

A file is read through a window that moves forward, so neither its text nor its rows are held as a whole, and
reading can go on behind a broken row.
"""

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.errors import DATA, UserError
from onecard.schemas import BadRow

CHUNK = 1 << 20  # characters read at a time
LONGEST_ROW = 32 << 20  # characters; anything longer is a mistake in the file


def values(path: Path) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each row of a JSON array or JSONL file.

    Raises UserError (exit 3) when the file is empty or holds something else.
    """
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: UTF-16 text.", "Save it as UTF-8.", DATA)
    # bytes that are not UTF-8 become lone surrogates, which schemas.check names
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = _first_character(file, path)
        is_array = start == "[" and not _is_lines_of_lists(file, path)
        yield from _array_values(file) if is_array else _line_values(file)


def _is_lines_of_lists(file: io.TextIOBase, path: Path) -> bool:
    """Whether each line is a list of its own (dialogues), not the file one array of rows."""
    first, second = file.readline(LONGEST_ROW), file.readline(CHUNK)
    file.seek(0)
    if not (second.lstrip().startswith("[") or (path.suffix == ".jsonl" and not second.strip())):
        return False
    try:
        return isinstance(_DECODER.decode(first.strip()), list)
    except (ValueError, RecursionError):
        return False


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


def _line_values(file: io.TextIOBase) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each line of a JSONL file."""
    for line, text in enumerate(iter(lambda: file.readline(LONGEST_ROW + 1), ""), start=1):
        if not text.strip():
            continue
        if len(text) > LONGEST_ROW:
            yield line, 1, BadRow(line, 1, _too_long(), text[:1000], text[:80]), ""
            while text and not text.endswith("\n"):
                text = file.readline(CHUNK)
            continue
        try:
            yield line, 1, _DECODER.decode(text.rstrip()), text
        except ValueError as error:
            column = getattr(error, "colno", 1)
            near = text[max(0, column - 40) : column + 80]
            yield line, column, BadRow(line, column, _reason(error), text.rstrip("\n"), near), text
        except RecursionError:
            yield line, 1, BadRow(line, 1, "nested too deeply", text.rstrip("\n"), text[:80]), text


def _array_values(file: io.TextIOBase) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each element of a JSON array, read in pieces."""
    window = _Window(file)
    window.skip(_BLANK)
    window.advance(1)  # the opening bracket
    first = True
    while True:
        window.skip(_BLANK)
        if window.peek() == "]":
            window.advance(1)
            window.skip(_BLANK)
            if window.peek():
                yield *window.place(), window.bad("text after the closing bracket", window.position), ""
            return
        if not window.peek():
            yield *window.place(), window.bad("the file ends before the closing bracket", window.position), ""
            return
        lost = None  # what is wrong with the row that follows, before it is read
        if not first and window.peek() != ",":
            lost = window.bad("a comma is missing between two rows", window.position)
        elif not first:
            window.advance(1)
            window.skip(_BLANK)
        first = False
        line, column = window.place()
        try:
            value, end = window.decode()
        except ValueError as error:
            bad = lost or window.bad(_reason(error), getattr(error, "pos", window.position))
            skipped = window.to_next_row()
            yield line, column, dataclasses.replace(bad, text=skipped), ""
            first = True  # to_next_row has already passed the comma
            if window.ended and not window.peek():
                return
            continue
        text = window.text[window.position : end]
        window.advance(end - window.position)
        yield line, column, dataclasses.replace(lost, text=text) if lost else value, text


class _Window:
    """A part of a text file that moves forward: `position` is where the next value is looked for."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.position, self.ended = file, "", 0, False
        self.line, self.column = 1, 1  # of `position`

    def more(self) -> bool:
        if len(self.text) - self.position > LONGEST_ROW:
            raise ValueError(_too_long())
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
        near = self.text[max(self.position, position - 40) : position + 80]
        return BadRow(*self.place(position), reason, near, near)

    def to_next_row(self) -> str:
        """Move to what looks like the next row, a brace after a closing brace and a comma, or to the end.

        Returns the text that was passed over, without the comma.
        """
        while True:
            found = _NEXT_ROW.search(self.text, self.position)
            if found or self.ended or len(self.text) - self.position > LONGEST_ROW:
                end = found.start() + 1 if found else len(self.text)
                skipped = self.text[self.position : end]
                self.advance((found.end() if found else end) - self.position)
                if not found:
                    self.ended, self.text = True, self.text[: self.position]
                return skipped
            self.more()


def _reason(error: ValueError) -> str:
    return f"broken JSON, {error.msg.lower()}" if isinstance(error, json.JSONDecodeError) else str(error)


def _too_long() -> str:
    return f"a row of more than {LONGEST_ROW >> 20} million characters"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return made


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
_BLANK = re.compile(r"[ \t\r\n]")
_NEXT_ROW = re.compile(r"\}\s*,\s*(?=\{)")
