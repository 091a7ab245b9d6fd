"""What --data_path names -> conversations, one at a time: files of any format, folders, several with weights.

Which format: by the file's ending; which schema: by looking at each row (schemas.py). This file does not know
templates, tokens or models.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from onecard.config.training import FORMATS
from onecard.data import json_rows, pickled_rows, tables
from onecard.data import schemas as data_schemas
from onecard.data.conversation import Conversation
from onecard.data.schemas import BadRow
from onecard.errors import DATA, UserError
from onecard.system.files import or_sample

EVALUATION = "--eval_data_path"
LEFT_OUT = ".dropped.jsonl"  # what check_data.py leaves out of a clean file
METADATA = ("dataset_infos.json", "dataset_dict.json", "state.json")  # of datasets on the hub
TRAIN = re.compile(r"(^|[^a-z])train([^a-z]|$)")
HEAVIEST = 1000  # weight of a file
WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d+)?)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")  # with a revision
Fetch = Callable[[str], str]  # name of a dataset on the hub -> local folder


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of rows; `weight` is how often each of its rows comes up in an epoch."""

    path: Path
    weight: float = 1.0
    validation: bool = False


def sources(data_path: str, eval_data_path: str | None = None, fetch: Fetch | None = None) -> list[Source]:
    """The files behind --data_path, then those behind --eval_data_path.

    Raises UserError (exit 3) when one does not exist or a folder holds none.
    """
    wanted = [("--data_path", data_path, False), (EVALUATION, eval_data_path or "", True)]
    if not _parts(data_path):
        raise UserError("--data_path is empty.", "Name a file of rows, a folder or a hub dataset.", DATA)
    return [
        dataclasses.replace(source, validation=validation)
        for flag, text, validation in wanted
        for part in _parts(text)
        for source in _source(part, flag, fetch)
    ]


def _parts(text: str) -> list[str]:
    """Commas separate files, unless a file is called so."""
    return (
        [text] if text and Path(text).exists() else [part.strip() for part in text.split(",") if part.strip()]
    )


def _source(text: str, flag: str, fetch: Fetch | None) -> list[Source]:
    path, weight, fetched = Path(text), 1.0, False
    weighted = WEIGHTED.fullmatch(text)
    if not path.exists() and weighted:
        path, weight = Path(weighted["path"]), float(weighted["weight"])
    if not 0 < weight <= HEAVIEST:
        problem = f"{flag} {text}: a weight must be above 0 and at most {HEAVIEST}."
        raise UserError(problem, "It says how often a row comes up in an epoch.", DATA)
    if flag == EVALUATION and weight != 1:
        problem = f"{flag} {text}: validation rows have no weight."
        raise UserError(problem, "Leave the number out: every row counts once.", DATA)
    path = or_sample(path)
    if not path.exists() and fetch and HUB_NAME.fullmatch(str(path)) and _ending(path) not in FORMATS:
        path, fetched = Path(fetch(str(path))), True
    if path.is_dir():
        inside = (p for p in path.rglob("*") if _ending(p) in FORMATS and p.is_file())
        files = sorted(p for p in inside if _is_ours(p.relative_to(path)))
        if fetched:  # of a dataset with named splits only the one to train on
            files = [p for p in files if TRAIN.search(str(p.relative_to(path)).lower())] or files
        if not files:
            problem = f"{flag} {path}: the folder holds no file of rows."
            raise UserError(problem, f"Name a file, or a folder of {', '.join(FORMATS)}.", DATA)
        return [Source(file, weight) for file in files]
    if not path.is_file():
        problem = f"{flag} {path}: " + ("this is not a regular file." if path.exists() else "no such file.")
        raise UserError(problem, "Name a file of rows (JSON, JSONL, CSV, Parquet) or a folder of them.", DATA)
    return [Source(path, weight)]


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _is_ours(inside: Path) -> bool:
    """Whether a file in a folder holds rows: not hidden, not what check_data left out of a clean file."""
    hidden = any(part.startswith(".") for part in inside.parts)
    return not hidden and not inside.name.endswith(LEFT_OUT) and inside.name not in METADATA


def read_rows(path: str | Path, schema: str | None = None) -> Iterator[Conversation | BadRow]:
    """Stream the rows of one file; raises UserError (exit 3) when it is empty or holds something else."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--data_path {path}: no such file.", "Name a file of rows.", DATA)
    try:
        for item in values(path):
            yield conversation(*item, schema)
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror or error}.", "Check the file and its rights.", DATA
        ) from None


def conversation(
    line: int, column: int, value: Any, text: str, schema: str | None = None
) -> Conversation | BadRow:
    """What one of values() is as a conversation."""
    if isinstance(value, BadRow):
        return value
    if len(text) > json_rows.LONGEST_ROW:
        return BadRow(line, column, json_rows.too_long(), text[: json_rows.KEPT])
    try:
        return data_schemas.conversation(value, schema)
    except data_schemas.RowError as error:
        return BadRow(line, column, str(error), text.strip())


def values(path: Path) -> Iterator[tuple[int, int, object, str]]:
    """(line, column, value or BadRow, text) of each row, whatever the format."""
    ending = _ending(path)
    if ending in (".csv", ".tsv"):
        return tables.csv_values(path)
    if ending == ".parquet":
        return tables.parquet_values(path)
    if ending == ".pkl":
        return map(_unwrapped, json_rows.values(pickled_rows.as_jsonl(path)))
    return json_rows.values(path)


def _unwrapped(item: tuple[int, int, Any, str]) -> tuple[int, int, object, str]:
    line, _, value, text = item
    return line, 0, value if isinstance(value, BadRow) else value["row"], text


def pick_rows(files: list[Path], numbers: list[int], schema: str | None = None) -> list[Conversation]:
    """The rows with these numbers (counted from 1 over all files), read again, in the order of `numbers`."""
    wanted = set(numbers)
    rows = (row for path in files for row in read_rows(path, schema))
    rows = islice(rows, max(wanted, default=0))
    found = {number: row for number, row in enumerate(rows, start=1) if number in wanted}
    return [found[number] for number in numbers if isinstance(found.get(number), Conversation)]
