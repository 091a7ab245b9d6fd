"""Finds the files that --data_path names, and reads their rows as conversations, one at a time.

--data_path names files, folders, or several of them with weights. The ending of a file tells its format, and
the keys of each row its schema (schemas.py). This file knows no templates, tokens or models.
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

LEFT_OUT = ".dropped.jsonl"  # ending of the file in which check_data.py lists rows that it left out
METADATA = ("dataset_infos.json", "dataset_dict.json", "state.json")  # files of hub datasets without rows
TRAIN = re.compile(r"(^|[^a-z])train([^a-z]|$)")
HEAVIEST = 1000  # the largest weight of a file
WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d+)?)")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")  # perhaps with a revision
Fetch = Callable[[str], str]  # downloads a dataset of the hub by its name and returns its local folder


@dataclasses.dataclass(frozen=True)
class RowFile:
    """A file of rows; `weight` says how often each of its rows comes up in an epoch."""

    path: Path
    weight: float = 1.0
    validation: bool = False


def locate_files(data_path: str, fetch: Fetch | None = None) -> list[RowFile]:
    """The files that --data_path names.

    With `fetch`, a name that is no path may be a dataset on the hub. Raises UserError (exit 3) when a file
    does not exist or a folder holds no file of rows.
    """
    if not _parts(data_path):
        raise UserError("--data_path is empty.", "Name a file of rows, a folder or a hub dataset.", DATA)
    return [file for part in _parts(data_path) for file in _locate(part, "--data_path", fetch)]


def locate_validation_files(eval_data_path: str | None, fetch: Fetch | None = None) -> list[RowFile]:
    """The files that --eval_data_path names, which have no weights; otherwise like locate_files."""
    flag = "--eval_data_path"
    files: list[RowFile] = []
    for part in _parts(eval_data_path or ""):
        if _split_weight(part, flag)[1] != 1:
            problem = f"{flag} {part}: validation rows have no weight."
            raise UserError(problem, "Leave the number out: every row counts once.", DATA)
        files += [dataclasses.replace(file, validation=True) for file in _locate(part, flag, fetch)]
    return files


def _parts(text: str) -> list[str]:
    """The paths that commas separate, unless a file has this whole name."""
    if text and Path(text).exists():
        return [text]
    return [part.strip() for part in text.split(",") if part.strip()]


def _split_weight(text: str, flag: str) -> tuple[Path, float]:
    """The path and the weight in PATH:WEIGHT; 1 without a weight, or where a file has this whole name."""
    weighted = WEIGHTED.fullmatch(text)
    if not weighted or Path(text).exists():
        return Path(text), 1.0
    weight = float(weighted["weight"])
    if not 0 < weight <= HEAVIEST:
        problem = f"{flag} {text}: a weight must be above 0 and at most {HEAVIEST}."
        raise UserError(
            problem, "A weight says how often each row comes up in an epoch; give one in this range.", DATA
        )
    return Path(weighted["path"]), weight


def _locate(text: str, flag: str, fetch: Fetch | None) -> list[RowFile]:
    path, weight = _split_weight(text, flag)
    path, is_hub_dataset = or_sample(path), False
    if not path.exists() and fetch and HUB_NAME.fullmatch(str(path)) and _ending(path) not in FORMATS:
        path, is_hub_dataset = Path(fetch(str(path))), True
    if path.is_dir():
        candidates = (p for p in path.rglob("*") if _ending(p) in FORMATS and p.is_file())
        files = sorted(p for p in candidates if _holds_rows(p.relative_to(path)))
        if is_hub_dataset:  # where its splits have names, only the one to train on
            files = [p for p in files if TRAIN.search(str(p.relative_to(path)).lower())] or files
        if not files:
            problem = f"{flag} {path}: the folder holds no file of rows."
            raise UserError(problem, f"Name a file, or a folder of {', '.join(FORMATS)}.", DATA)
        return [RowFile(file, weight) for file in files]
    if not path.is_file():
        problem = f"{flag} {path}: " + ("this is not a regular file." if path.exists() else "no such file.")
        raise UserError(problem, "Name a file of rows (JSON, JSONL, CSV, Parquet) or a folder of them.", DATA)
    return [RowFile(path, weight)]


def _ending(path: Path) -> str:
    return path.suffix.lower()


def _holds_rows(path: Path) -> bool:
    """Whether a file holds rows to read: not a hidden file, not metadata, not the rows that a check left out.

    path: relative to the folder that was named.
    """
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and not path.name.endswith(LEFT_OUT) and path.name not in METADATA


def read_rows(path: str | Path, schema: str | None = None) -> Iterator[Conversation | BadRow]:
    """The rows of one file, one at a time; schema: the name of one, or None to tell it by each row's keys.

    Raises UserError (exit 3) when the file is empty or does not hold rows.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--data_path {path}: no such file.", "Name a file of rows.", DATA)
    try:
        for item in values(path):
            yield conversation(*item, schema)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error.strerror or error}.",
            "Check the file and who may read it.",
            DATA,
        ) from None


def conversation(
    line: int, column: int, value: Any, text: str, schema: str | None = None
) -> Conversation | BadRow:
    """One item of values() as a conversation, or as a bad row with the reason."""
    if isinstance(value, BadRow):
        return value
    if len(text) > json_rows.LONGEST_ROW:
        return BadRow(line, column, json_rows.too_long(), text[: json_rows.REPORTED])
    try:
        return data_schemas.conversation(value, schema)
    except data_schemas.RowError as error:
        return BadRow(line, column, str(error), text.strip())


def values(path: Path) -> Iterator[tuple[int, int, object, str]]:
    """(line, column, value or BadRow, text) of each row of a file in any format.

    Where the format has no lines, `line` is the number of the row and `column` is 0. Raises UserError when
    the file cannot be read as its ending says: exit 3, or exit 8 for a pickle that is not plain.
    """
    ending = _ending(path)
    if ending in (".csv", ".tsv"):
        return tables.csv_values(path)
    if ending == ".parquet":
        return tables.parquet_values(path)
    if ending == ".pkl":
        return map(_unwrapped, json_rows.values(pickled_rows.convert_to_jsonl(path)))
    return json_rows.values(path)


def _unwrapped(item: tuple[int, int, Any, str]) -> tuple[int, int, object, str]:
    line, _, value, text = item
    return line, 0, value if isinstance(value, BadRow) else value["row"], text


def pick_rows(files: list[Path], numbers: list[int], schema: str | None = None) -> list[Conversation]:
    """Read the good rows with these numbers, counted from 1 over all files; returns them in this order."""
    chosen = set(numbers)
    rows = (row for path in files for row in read_rows(path, schema))
    rows = islice(rows, max(chosen, default=0))
    by_number = {number: row for number, row in enumerate(rows, start=1) if number in chosen}
    return [by_number[number] for number in numbers if isinstance(by_number.get(number), Conversation)]
