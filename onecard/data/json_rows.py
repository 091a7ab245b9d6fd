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

from onecard.data.schemas import BadRow, RowError, recognise
from onecard.errors import DATA, UserError

CHUNK = 1 << 20  # characters read at a time
LONGEST_ROW = 32 << 20  # characters; anything longer is a mistake in the file
GLANCE = 1 << 16  # characters in which the start of a row is looked at
KEPT = 100_000  # characters of a bad row


def values(path: Path) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each row of a JSON array or JSONL file.

    Raises UserError (exit 3) when the file is empty or holds something else.
    """
    refuse_utf16(path)
    # bytes that are not UTF-8 become lone surrogates, which schemas.check names
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = _first_character(file, path)
        is_array = start == "[" and not _is_lines_of_lists(file)
        yield from _array_values(file) if is_array else _line_values(file)


def refuse_utf16(path: Path) -> None:
    """Raise UserError (exit 3) for a text that begins with UTF-16's mark."""
    with path.open("rb") as raw:
        if raw.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"{path}: UTF-16 text.", "Save it as UTF-8.", DATA)


def _is_lines_of_lists(file: io.TextIOBase) -> bool:
    """Whether each line is a list of its own (dialogues), not the file one array of rows."""
    first, second = file.readline(LONGEST_ROW), file.readline(CHUNK)
    file.seek(0)
    if not second.lstrip().startswith("["):  # a single line is one array, whatever the file is called
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
    """(line, column, value or BadRow, text) of each element of a JSON array, read in pieces."""
    window = _Window(file)
    window.skip(_BLANK)
    window.advance(1)  # the opening bracket
    first, known = True, None  # known: keys of the last whole row
    while True:
        above = window.line
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
        opening, starts_line = window.peek(), line > above or window.at_line
        window.at_line = False
        try:
            value, end = window.decode()
        except ValueError as error:
            bad = lost or window.bad(_reason(error), getattr(error, "pos", window.position))
            skipped = window.to_next_row(opening, column - 1 if starts_line else None, known)
            yield line, column, dataclasses.replace(bad, text=skipped), ""
            first = True  # to_next_row has already passed the comma
            if not window.peek():
                return
            continue
        known = frozenset(value) if isinstance(value, dict) else None
        text = window.text[window.position : end]
        window.advance(end - window.position)
        yield line, column, dataclasses.replace(lost, text=text) if lost else value, text


class _Window:
    """A part of a text file that moves forward: `position` is where the next value is looked for."""

    def __init__(self, file: io.TextIOBase):
        self.file, self.text, self.position, self.ended = file, "", 0, False
        self.line, self.column = 1, 1  # of `position`
        self.at_line = False  # whether to_next_row has just come to the start of a line

    def more(self, any_length: bool = False) -> bool:
        if len(self.text) - self.position > LONGEST_ROW and not any_length:
            raise ValueError(too_long())
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

    def to_next_row(self, opening: str, indent: int | None, known: frozenset[str] | None) -> str:
        """Move to what looks like the next row, or to the end; returns the text that was passed over.

        opening: the first character of the broken row; indent: of its line, if it starts one. The next row
        is the next line with that indent and character (a text holds no line break), or stands behind a
        closing bracket and a comma: what can be read as a row there, or cannot be read and follows even
        brackets. Nothing that is a turn of a conversation is a row.
        """
        bracket = re.escape(opening if opening in ("{", "[") else "{")
        border = rf"\n[ \t]{{{indent or 0}}}(?={bracket})|[}}\]]\s*,\s*(?={bracket})"
        passed = ""
        while True:
            found = self._border(re.compile(border), known)
            if found is None and not self.ended and len(self.text) - self.position > LONGEST_ROW:
                keep = len(self.text) - CHUNK  # a row without end: only its beginning is kept
                passed = (passed + self.text[self.position : keep])[:KEPT]
                self.advance(keep - self.position)
            if found is not None or not self.more(any_length=True):
                break
        end = len(self.text) if found is None else found
        passed = passed or self.text[self.position : end]
        self.at_line = not passed.rpartition("\n")[2].strip() and "\n" in passed
        self.advance(end - self.position)
        return passed.rstrip().rstrip(",")

    def _border(self, border: re.Pattern, known: frozenset[str] | None) -> int | None:
        """Where the next row starts, as far as the text is known."""
        depth = _Depth(self.text, self.position)
        for found in border.finditer(self.text, self.position):
            fits = found[0][0] == "\n" or depth.at(found.start() + 1) == 0
            if self._is_row(found.end(), known, fits):
                return found.end()
        return None

    def _is_row(self, position: int, known: frozenset[str] | None, fits: bool) -> bool:
        """fits: whether it stands where a row would; else only what is like a row is one."""
        try:
            value, _ = _DECODER.raw_decode(self.text[position : position + GLANCE])
        except (ValueError, RecursionError):
            return fits
        if isinstance(value, list):
            return bool(value) and all(isinstance(turn, dict) for turn in value)
        schema = _schema_of(value)
        if value.keys() & {"role", "from"}:  # {role, content} of a conversation is no row of raw text
            return schema not in (None, "content", "text")
        return fits or value.keys() == known or schema is not None


class _Depth:
    """How many brackets are open at a position that only moves forward; brackets in texts do not count."""

    def __init__(self, text: str, position: int):
        self.text, self.position, self.depth, self.quoted = text, position, 0, False

    def at(self, position: int) -> int:
        for found in _MARKS.finditer(self.text, self.position, position):
            mark = found[0]
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
_MARKS = re.compile(r"\\.|[\"{}\[\]]", re.DOTALL)
