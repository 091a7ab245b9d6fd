"""Copies of the database in backups/ of the data folder: a few of the newest, and one of each older schema.

A copy appears whole: SQLite copies into another file, which is synced and renamed. The name says when it was
written (UTC) and by which revision of the schema it can be read.
"""

import contextlib
import os
import re
import sqlite3
import time
from collections.abc import Collection
from pathlib import Path

from onecard.serving import database as serving_database
from onecard.serving.database import Database
from onecard.system import files as system_files

FOLDER = "backups"
KEPT = 7  # newest copies
NAME = re.compile(r"onecard-(?P<time>\d{8}T\d{6}Z)-(?P<revision>\w+)\.db")


def write(database: Database, revision: str, now: float) -> Path:
    """Copy the database, and delete the oldest copies. Returns the path.

    revision: of its schema; now: seconds since 1970. One process at a time. Raises StoreUnavailableError.
    """
    folder = database.folder / FOLDER
    path = folder / f"onecard-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{revision}.db"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for unfinished in folder.glob(".*.tmp*"):  # of a killed process
            unfinished.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        with database.driver() as source, contextlib.closing(sqlite3.connect(temporary)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
        system_files.put_file(temporary, path)
        for older in superfluous(every(database.folder)):
            older.unlink(missing_ok=True)
    except OSError as error:
        kind = serving_database.FULL
        raise serving_database.StoreUnavailableError(path, kind, error.strerror or "") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def every(folder: Path) -> list[Path]:
    """The copies of a data folder, the newest first."""
    paths = (folder / FOLDER).glob("*.db") if (folder / FOLDER).is_dir() else ()
    return sorted((path for path in paths if NAME.fullmatch(path.name)), reverse=True)


def superfluous(paths: list[Path]) -> list[Path]:
    """Those of the copies, the newest first, that need not be kept."""
    seen: set[str] = set()
    rest = []
    for number, path in enumerate(paths):
        is_first = revision_of(path) not in seen
        seen.add(revision_of(path))
        if number >= KEPT and not is_first:
            rest.append(path)
    return rest


def newest(folder: Path, revisions: Collection[str]) -> Path | None:
    """The newest copy that can be read with one of these revisions of the schema."""
    return next((path for path in every(folder) if revision_of(path) in revisions), None)


def is_due(folder: Path, now: float) -> bool:
    """Whether there is no copy of this day (UTC)."""
    today = time.strftime("%Y%m%d", time.gmtime(now))
    return not any(path.name.startswith(f"onecard-{today}T") for path in every(folder))


def revision_of(path: Path) -> str:
    """The revision of the schema of a copy, by its name."""
    match = NAME.fullmatch(path.name)
    assert match, path
    return match["revision"]
