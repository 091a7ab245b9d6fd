"""A data folder that is ready for use: checked, migrated, and backed up.

DATA/onecard.db, onecard.db-wal, onecard.db-shm   keys and all other rows; private
DATA/blobs/                                       stored files
DATA/backups/                                     copies of the database
DATA/.lock, .opening.lock                         the lock of the one service; of a start or migration
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from onecard.errors import DISK, UserError
from onecard.serving import backups, schema
from onecard.serving.blobs import Blobs, Collected
from onecard.serving.database import PATIENCE, Database
from onecard.serving.keys import Keys
from onecard.system import files as system_files
from onecard.system import lock

OPENING = ".opening.lock"


@dataclasses.dataclass(frozen=True)
class Store:
    """What a data folder has. collected: what the start of the service has deleted and noticed."""

    folder: Path
    database: Database
    keys: Keys
    blobs: Blobs
    revision: str  # of the schema
    collected: Collected | None = None  # None where no service has started

    def back_up(self, now: float | None = None) -> Path | None:
        """Copy the database unless there is a copy of this day. Returns the path of a new copy.

        A service that runs for days calls it now and then. Raises StoreUnavailableError.
        """
        now = time.time() if now is None else now
        with lock.held(self.folder / OPENING):
            if backups.is_due(self.folder, now):
                return backups.write(self.database, self.revision, now)
        return None


def folder_of(data_dir: str | None) -> Path:
    """The data folder of an option --data_dir."""
    return Path(data_dir) if data_dir else system_files.data_folder()


@contextlib.contextmanager
def opened(
    folder: Path,
    is_owner: bool = False,
    patience: float = PATIENCE,
    now: Callable[[], float] = time.time,
) -> Iterator[Store]:
    """The store of a data folder, which is created when it is missing; several processes may have it open.

    patience: seconds that a transaction waits for another one. Raises UserError as schema.prepare does.
    """
    make_private(folder)
    database = Database(folder, patience)
    try:
        with lock.held(folder / OPENING):
            revision = schema.prepare(database, is_owner, now())
        yield Store(folder, database, Keys(database, now), Blobs(database), revision)
    finally:
        database.close()


@contextlib.contextmanager
def served(folder: Path, patience: float = PATIENCE) -> Iterator[Store]:
    """The store for the one service of a data folder: its files are collected and today's backup is there.

    Raises UserError where a service runs already, and as `opened` does.
    """
    make_private(folder)
    with lock.owned(folder, schema.SERVES), opened(folder, is_owner=True, patience=patience) as store:
        collected = store.blobs.collect()
        store.back_up()
        yield dataclasses.replace(store, collected=collected)


def make_private(folder: Path) -> None:
    """Create a data folder for its owner alone, if it is missing. Raises UserError where that fails."""
    try:
        if not folder.exists():
            system_files.make_folder(folder)
            folder.chmod(0o700)
    except OSError as error:
        problem = f"{folder} cannot be created: {error.strerror}."
        raise UserError(problem, "Choose another folder.", DISK) from None
