"""Reads JSON arrays and JSONL files one row at a time, with the location of whatever is wrong.

A window moves forward over the text, so neither the text nor the rows are in memory as a whole, and reading
can continue after a broken row.
"""

import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.data.schemas import BadRow, RowError, recognise
from onecard.errors import DATA, UserError

CHUNK = 1 << 20  # characters read at a time
LONGEST_ROW = 32 << 20  # characters; anything longer is a mistake in the file
GLANCE = 1 << 16  # characters that are parsed to see whether a row starts here
REPORTED = 100_000  # characters of a bad row that are reported


def values(path: Path) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each row of a JSON array or JSONL file.

    Raises UserError (exit 3) when the file is empty, is UTF-16, or does not hold rows.
    """
    refuse_utf16(path)
    # bytes that are not UTF-8 become lone surrogates, which schemas.check names
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = _first_character(file, path)
        is_array = start == "[" and not _is_lines_of_lists(file)
        yield from _array_values(file) if is_array else _line_values(file)


def refuse_utf16(path: Path) -> None:
    """Raise UserError (exit 3) for a file that begins with the byte order mark of UTF-16."""
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: the text is UTF-16.", "Save the file as UTF-8.", DATA)


def _is_lines_of_lists(file: io.TextIOBase) -> bool:
    """Whether each line is a list (a dialogue), so that the file is not one array of rows."""
    first, second = file.readline(LONGEST_ROW), file.readline(CHUNK)
    file.seek(0)
    if not second.lstrip().startswith("["):  # a single line is one array of rows, even in a .jsonl file
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
            f"{path}: the file is empty.", "It should hold rows like {instruction, input, output}.", DATA
        )
    if head[0] not in "[{":
        problem = f"{path}:1:1: this is neither a JSON array nor JSONL; it begins with {head[:20]!r}."
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
            yield line, 1, BadRow(line, 1, too_long(), text[:1000], text[:80]), ""
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
    """(line, column, value or BadRow, text) of each element of a JSON array."""
    window = _Window(file)
    window.skip(_BLANK)
    window.advance(1)  # the opening bracket
    is_first, last_keys = True, None  # last_keys: of the last whole row
    while True:
        above = window.line
        window.skip(_BLANK)
        if window.peek() == "]":
            window.advance(1)
            window.skip(_BLANK)
            if window.peek():
                yield *window.location(), window.bad("text after the closing bracket", window.position), ""
            return
        if not window.peek():
            yield (
                *window.location(),
                window.bad("the file ends before the closing bracket", window.position),
                "",
            )
            return
        bad_comma = None  # set when the comma before the row is missing
        if not is_first and window.peek() != ",":
            bad_comma = window.bad("a comma is missing between two rows", window.position)
        elif not is_first:
            window.advance(1)
            window.skip(_BLANK)
        is_first = False
        line, column = window.location()
        opening, starts_line = window.peek(), line > above or window.at_line
        window.at_line = False
        try:
            value, end = window.decode()
        except ValueError as error:
            bad = bad_comma or window.bad(_reason(error), getattr(error, "pos", window.position))
            skipped = window.skip_to_next_row(opening, column - 1 if starts_line else None, last_keys)
            yield line, column, dataclasses.replace(bad, text=skipped), ""
            is_first = True  # skip_to_next_row has already passed the comma
            if not window.peek():
                return
            continue
        last_keys = frozenset(value) if isinstance(value, dict) else None
        text = window.text[window.position : end]
        window.advance(end - window.position)
        yield line, column, dataclasses.replace(bad_comma, text=text) if bad_comma else value, text


class _Window:
    """A part of a text file that moves forward. `position` is where the next value is expected."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.position, self.ended = file, "", 0, False
        self.line, self.column = 1, 1  # of `position`
        self.at_line = False  # whether skip_to_next_row has just reached the start of a line

    def more(self, any_length: bool = False) -> bool:
        """Read on; returns whether there was more. Raises ValueError when a row gets too long."""
        if len(self.text) - self.position > LONGEST_ROW and not any_length:
            raise ValueError(too_long())
        self._forget()
        piece = "" if self.ended else self.file.read(max(CHUNK, len(self.text)))
        self.ended = not piece
        self.text += piece
        return not self.ended

    def _forget(self) -> None:
        """Drop the text before `position`."""
        self.text, self.position = self.text[self.position :], 0

    def peek(self) -> str:
        """The character at `position`; "" at the end of the file."""
        while self.position >= len(self.text) and self.more():
            pass
        return self.text[self.position : self.position + 1]

    def skip(self, pattern: re.Pattern) -> None:
        while self.peek() and pattern.match(self.text, self.position):
            self.advance(1)

    def advance(self, count: int) -> None:
        self.line, self.column = self.location(self.position + count)
        self.position += count
        if self.position > CHUNK:
            self._forget()

    def location(self, position: int | None = None) -> tuple[int, int]:
        """Line and column, both counted from 1, of `self.position` or of a position after it."""
        ahead = self.text[self.position : position] if position is not None else ""
        newlines = ahead.count("\n")
        return self.line + newlines, len(ahead) - ahead.rfind("\n") if newlines else self.column + len(ahead)

    def decode(self) -> tuple[Any, int]:
        """The JSON value at `position`, and its end. Reads on while the value may be incomplete."""
        while True:
            try:
                before = self.position
                value, end = _DECODER.raw_decode(self.text, before)
                # a number at the end of the window may continue after it
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
        """A bad row that is wrong at this position."""
        position = min(position, len(self.text))
        near = self.text[max(self.position, position - 40) : position + 80]
        return BadRow(*self.location(position), reason, near, near)

    def skip_to_next_row(self, opening: str, indent: int | None, last_keys: frozenset[str] | None) -> str:
        """Move from a broken row to what looks like the next row, or to the end; returns the skipped text.

        opening: the first character of the broken row; indent: of its line, if the row starts a line. A next
        row starts in a line with the same indent and character (JSON texts hold no line breaks), or after a
        closing bracket and a comma. There it can be read as a row; or it cannot be read, and all brackets
        before it are closed. A turn of a conversation is never a row.
        """
        bracket = re.escape(opening if opening in ("{", "[") else "{")
        border = rf"\n[ \t]{{{indent or 0}}}(?={bracket})|[}}\]]\s*,\s*(?={bracket})"
        skipped = ""
        while True:
            start = self._next_start(re.compile(border), last_keys)
            if start is None and not self.ended and len(self.text) - self.position > LONGEST_ROW:
                end = len(self.text) - CHUNK  # a row without end: only its beginning is reported
                skipped = (skipped + self.text[self.position : end])[:REPORTED]
                self.advance(end - self.position)
            if start is not None or not self.more(any_length=True):
                break
        end = len(self.text) if start is None else start
        skipped = skipped or self.text[self.position : end]
        self.at_line = not skipped.rpartition("\n")[2].strip() and "\n" in skipped
        self.advance(end - self.position)
        return skipped.rstrip().rstrip(",")

    def _next_start(self, border: re.Pattern, last_keys: frozenset[str] | None) -> int | None:
        """Where the next row starts; None when it does not start in the window."""
        depth = _Depth(self.text, self.position)
        for match in border.finditer(self.text, self.position):
            fits = match[0][0] == "\n" or depth.advance_to(match.start() + 1) == 0
            if self._is_row(match.end(), last_keys, fits):
                return match.end()
        return None

    def _is_row(self, position: int, last_keys: frozenset[str] | None, fits: bool) -> bool:
        """Whether a row starts here. fits: whether a row may stand here; if not, it must look like one."""
        try:
            value, _ = _DECODER.raw_decode(self.text[position : position + GLANCE])
        except (ValueError, RecursionError):
            return fits
        if isinstance(value, list):
            return bool(value) and all(isinstance(turn, dict) for turn in value)
        schema = _schema_of(value)
        if value.keys() & {"role", "from"}:  # a turn {role, content} is no row of raw text
            return schema not in (None, "content", "text")
        return fits or value.keys() == last_keys or schema is not None


class _Depth:
    """Counts the open brackets at a position that only moves forward; those inside texts do not count."""

    def __init__(self, text: str, position: int):
        self.text, self.position, self.depth, self.quoted = text, position, 0, False

    def advance_to(self, position: int) -> int:
        """Move to this position; returns how many brackets are open there."""
        for match in _MARKS.finditer(self.text, self.position, position):
            mark = match[0]
            if mark == '"':
                self.quoted = not self.quoted
            elif not self.quoted and len(mark) == 1:
                self.depth += 1 if mark in "{[" else -1
        self.position = position
        return self.depth


def _schema_of(value: Any) -> str | None:
    try:
        return recognise(value)
    except RowError:
        return None


def _reason(error: ValueError) -> str:
    return f"broken JSON, {error.msg.lower()}" if isinstance(error, json.JSONDecodeError) else str(error)


def too_long() -> str:
    """The reason of a bad row that is longer than LONGEST_ROW."""
    return f"a row of more than {LONGEST_ROW >> 20} million characters"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        repeated = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {repeated[:40]!r} occurs twice")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
_BLANK = re.compile(r"[ \t\r\n]")
_MARKS = re.compile(r"\\.|[\"{}\[\]]", re.DOTALL)
