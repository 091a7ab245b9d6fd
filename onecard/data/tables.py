"""Reads CSV and Parquet files one row at a time, with the location of what is wrong; writes Parquet."""

import csv
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.data.json_rows import LONGEST_ROW, REPORTED, refuse_utf16
from onecard.data.schemas import BadRow
from onecard.errors import DATA, DISK, UserError, first_line
from onecard.system import files as system_files
from onecard.system import sandbox

ROWS = 1000  # rows of a Parquet file that are in memory at a time
MEMORY = 8 << 30  # bytes of address space of the child that reads a Parquet file


def csv_values(path: Path) -> Iterator[tuple[int, int, Any, str]]:
    """(line, column, value or BadRow, text) of each row of a CSV or TSV file with a header.

    Of a broken row, such as one whose quote is never closed, the first line is the bad row; reading goes on
    with the next line. Raises UserError (exit 3) when there is no header or the text is UTF-16.
    """
    csv.field_size_limit(LONGEST_ROW)
    refuse_utf16(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = _Lines(file)
        settings = {"strict": True, "delimiter": "\t" if path.suffix.lower() == ".tsv" else ","}
        rows = csv.reader(lines, **settings)
        header = _header(rows, path)
        while True:
            line = lines.begin()
            try:
                fields = next(rows, None)
            except csv.Error as error:
                text = lines.back_to_second()[:REPORTED]
                yield line, 1, BadRow(line, 1, f"not valid CSV ({error})", text), text
                rows = csv.reader(lines, **settings)
                continue
            if fields is None:
                return
            text = ",".join(fields)
            if len(fields) == len(header):
                yield line, 1, dict(zip(header, fields, strict=True)), text
            elif fields:
                reason = f"the row has {len(fields)} fields, the header {len(header)}"
                yield line, 1, BadRow(line, 1, reason, text), text


class _Lines:
    """The lines of a file; those of the row that is being read can be read again."""

    def __init__(self, file: Iterable[str]):
        self.file, self.row, self.again, self.read = iter(file), [], deque(), 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.popleft() if self.again else next(self.file)
        self.row.append(line)
        return line

    def begin(self) -> int:
        """Start a new row; returns the number of its first line."""
        self.read += len(self.row)
        self.row.clear()
        return self.read + 1

    def back_to_second(self) -> str:
        """Return the first line of this row; the others will be read again."""
        first, *others = self.row
        self.again.extendleft(reversed(others))
        self.row[:] = [first]
        return first


def _header(rows: Any, path: Path) -> list[str]:
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise UserError(
            f"{path}:1:1: this is not valid CSV ({error}).",
            "Check that this is a CSV file: its first line must name the columns.",
            DATA,
        ) from None
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or twice:
        problem = f"two columns are called {twice[0]!r}" if twice else "the file is empty"
        raise UserError(f"{path}: {problem}.", "Its first line must name the columns, each once.", DATA)
    return header


def parquet_values(path: Path) -> Iterator[tuple[int, int, Any, str]]:
    """(number, 0, value, text) of each row of a Parquet file, without the columns that are null in it.

    A child process reads the file, because a damaged file may crash the library. Raises UserError (exit 3)
    when the file is damaged.
    """
    number = 0
    try:
        for line in sandbox.lines(__name__, path):
            number += 1
            yield number, 0, json.loads(line), line.rstrip("\n")
    except sandbox.ChildError as error:
        problem = f"{path}: the Parquet file is damaged after row {number}: {error}."
        raise UserError(problem, "Write or download the file again.", DATA) from None


def _child(source: str) -> int:
    """Write each row of a Parquet file as a line of JSON."""
    import resource

    import pyarrow
    from pyarrow import parquet

    sandbox.limit(resource.RLIMIT_AS, MEMORY)
    number = 0
    try:
        with parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=ROWS):
                for row in batch.to_pylist():
                    number += 1
                    value = {name: field for name, field in row.items() if field is not None}
                    sys.stdout.write(json.dumps(value, ensure_ascii=False, default=_as_json) + "\n")
            row_count = file.metadata.num_rows
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError, OverflowError) as error:
        print(first_line(error), file=sys.stderr)
        return DATA
    if number != row_count:
        print(f"it holds {number} rows, but its metadata says {row_count}", file=sys.stderr)
        return DATA
    return 0


def _as_json(value: Any) -> Any:
    """Times and the like as text; of bytes, which are no text, only their number."""
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)


def write_parquet(
    paths: list[Path], values: Callable[[Path], Iterator[Any]], target: Path
) -> tuple[int, list[str]]:
    """Write all rows to one Parquet file with the columns of all rows; returns their number and the columns.

    values: reads the rows of a file, as reader.values does. Every file is read twice, first for the columns.
    Raises UserError: exit 3 at a bad row or when the types of a column differ, exit 7 when the target cannot
    be written. The target is complete, or as it was before.
    """
    import pyarrow
    from pyarrow import parquet

    def pieces(action: str) -> Iterator[list[dict[str, Any]]]:
        rows = (row for path in paths for row in _objects(path, values(path)))
        bar = tqdm(rows, desc=action, unit="row", disable=None)
        while piece := list(islice(bar, 10 * ROWS)):
            yield piece

    temporary = target.with_name(f".{target.name}.tmp")
    try:
        schema = pyarrow.schema([])
        for piece in pieces("reading columns"):
            columns = pyarrow.Table.from_pylist(_filled(piece)).schema
            schema = pyarrow.unify_schemas([schema, columns], promote_options="permissive")
        count = 0
        with parquet.ParquetWriter(temporary, schema) as writer:
            for piece in pieces("writing"):
                writer.write_table(pyarrow.Table.from_pylist(piece, schema=schema))
                count += len(piece)
        system_files.put_file(temporary, target)
    except (pyarrow.ArrowException, UnicodeError, OverflowError) as error:
        problem = f"{', '.join(map(str, paths))}: a column holds values of different types: {error}."
        raise UserError(problem, "Give all values of a column the same type.", DATA) from None
    except OSError as error:
        problem = f"{target}: cannot be written: {error.strerror or error}."
        raise UserError(problem, "Free some space, or choose another path.", DISK) from None
    finally:
        temporary.unlink(missing_ok=True)
    return count, schema.names


def _objects(path: Path, values: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for line, column, value, _ in values:
        bad = value if isinstance(value, BadRow) else None
        if bad is None and not isinstance(value, dict):
            bad = BadRow(line, column, "a row of a table must be an object", str(value)[:200])
        if bad:
            raise UserError(f"{bad.describe(path)}.", "Correct the row, or remove it.", DATA)
        yield value


def _filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows, with every key in the first one: pyarrow takes the columns from it alone."""
    return [{**dict.fromkeys(key for row in rows for key in row), **rows[0]}, *rows[1:]]


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogatepass")
    sys.exit(_child(sys.argv[1]))
