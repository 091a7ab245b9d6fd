"""Files of any size that a row of the database describes: the row is there exactly when the file is whole.

The file comes first: it is written under another name, synced and renamed, and then its row is committed. A
row is deleted before its file. So a kill or a power failure leaves at most files without a row, which
`collect` deletes when the service starts.
"""

import contextlib
import dataclasses
import hashlib
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import sqlalchemy

from onecard.serving import database as serving_database
from onecard.serving.database import Database
from onecard.serving.tables import BLOBS
from onecard.system import files as system_files

FOLDER = "blobs"
UNFINISHED = ".part"  # end of the name of a file that is being written


class NoBlobError(Exception):
    """The owner has no such file, or its file is damaged or lost."""


@dataclasses.dataclass(frozen=True)
class Collected:
    """What `collect` has deleted and noticed."""

    deleted: int  # files without a row
    lost: tuple[str, ...]  # ids of rows whose file is missing or has another size


class Blobs:
    """The stored files of a data folder; thread-safe."""

    def __init__(self, database: Database):
        self.database, self.folder = database, database.folder / FOLDER

    def store(self, parts: Iterable[bytes], owner: str) -> str:
        """Write a file from its parts; when this returns, it survives a power failure. Returns its id.

        Raises StoreUnavailableError, also for a full disk, and then nothing is stored.
        """
        name = f"file-{secrets.token_hex(16)}"
        path = self.folder / name
        try:
            size, sha256 = self._write(path, parts)
            values = {"id": name, "owner": owner, "size": size, "sha256": sha256, "created": int(time.time())}
            with self.database.writing() as connection:
                connection.execute(BLOBS.insert().values(**values))
        except Exception:
            # after an error of the commit nobody knows whether there is a row; then `collect` decides
            if not self._may_be_known(name):
                path.unlink(missing_ok=True)
            raise
        return name

    def _write(self, path: Path, parts: Iterable[bytes]) -> tuple[int, str]:
        """Write a file that appears whole; size in bytes and SHA-256. Errors of `parts` pass as they are."""
        temporary, sha256, size = path.with_name(path.name + UNFINISHED), hashlib.sha256(), 0
        try:
            with _disk_errors(path):
                self.folder.mkdir(mode=0o700, exist_ok=True)
                descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                for part in parts:
                    with _disk_errors(path):
                        _write_all(descriptor, part)
                    sha256.update(part)
                    size += len(part)
            finally:
                os.close(descriptor)
            with _disk_errors(path):
                system_files.put_file(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return size, sha256.hexdigest()

    def _may_be_known(self, name: str) -> bool:
        try:
            return self._row(name, None) is not None
        except serving_database.StoreUnavailableError:
            return True

    def open(self, name: str, owner: str) -> BinaryIO:
        """An owner's file, to be read and closed. Raises NoBlobError, also for a file of another owner."""
        row = self._row(name, owner)
        if row is None:
            raise NoBlobError(name)
        try:
            file = open(self.folder / row.id, "rb")  # noqa: SIM115 (the caller closes it)
        except FileNotFoundError:
            raise NoBlobError(name) from None
        if os.fstat(file.fileno()).st_size != row.size:
            file.close()
            raise NoBlobError(name)
        return file

    def delete(self, name: str, owner: str) -> None:
        """Delete an owner's file. Raises NoBlobError, also for a file of another owner."""
        with self.database.writing() as connection:
            deleted = connection.execute(BLOBS.delete().filter_by(id=name, owner=owner))
            if deleted.rowcount < 1:
                raise NoBlobError(name)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).unlink()
            system_files.sync_folder(self.folder)

    def collect(self) -> Collected:
        """Delete what has no row, and name the rows that have no whole file.

        Only the owner of the data folder may call it, before anything is stored: a file that is stored at the
        same time has no row yet.
        """
        with self.database.reading() as connection:
            sizes = {row.id: row.size for row in connection.execute(sqlalchemy.select(BLOBS))}
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        strays = [path for path in paths if path.name not in sizes]
        for path in strays:
            path.unlink()
        lost = [name for name, size in sizes.items() if not _has_size(self.folder / name, size)]
        return Collected(len(strays), tuple(sorted(lost)))

    def _row(self, name: str, owner: str | None) -> sqlalchemy.Row[tuple[object]] | None:
        query = sqlalchemy.select(BLOBS).filter_by(id=name)
        with self.database.reading() as connection:
            return connection.execute(query if owner is None else query.filter_by(owner=owner)).one_or_none()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = serving_database.FULL
        raise serving_database.StoreUnavailableError(path, kind, error.strerror or "") from error


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False
