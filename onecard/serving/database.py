"""The service's one SQLite database, onecard.db in the data folder: connections, transactions, errors.

Write-ahead log, synchronous FULL: what a transaction has committed survives a power failure, and readers do
not wait for the writer. Whoever cannot use the database gets a StoreUnavailableError; the service answers it
with 503. This file knows no table.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy
import sqlalchemy.exc
import tenacity

from onecard.errors import CHECKPOINT, DISK, UserError
from onecard.system import files as system_files

NAME = "onecard.db"
PATIENCE = 5.0  # seconds that a transaction waits for another process to end its own
CONNECTIONS = 8  # at the same time; further threads wait
PAUSE = 0.05  # seconds between two tries
PRAGMAS = ("synchronous=FULL", "foreign_keys=ON")
BUSY, FULL, CLOSED, DAMAGED = "busy", "full", "closed", "damaged"  # kinds of StoreUnavailableError
KINDS = {  # primary result code of SQLite (https://www.sqlite.org/rescode.html) -> kind
    sqlite3.SQLITE_BUSY: BUSY,
    sqlite3.SQLITE_LOCKED: BUSY,
    sqlite3.SQLITE_PROTOCOL: BUSY,
    sqlite3.SQLITE_FULL: FULL,
    sqlite3.SQLITE_IOERR: FULL,
    sqlite3.SQLITE_READONLY: CLOSED,
    sqlite3.SQLITE_CANTOPEN: CLOSED,
    sqlite3.SQLITE_PERM: CLOSED,
    sqlite3.SQLITE_CORRUPT: DAMAGED,
    sqlite3.SQLITE_NOTADB: DAMAGED,
}
FAILURES = (sqlite3.Error, sqlalchemy.exc.DBAPIError, UnicodeDecodeError)  # of SQLite and its module
WORDS = {  # kind -> (problem, what to do, seconds after which another try makes sense)
    BUSY: ("another process has been writing to it for too long", "Try again later.", 5),
    FULL: ("the disk takes no more", "Make room on the disk.", 60),
    CLOSED: ("it cannot be opened or written", "Check the rights of the file and its folder.", 60),
    DAMAGED: ("it is damaged", "Start the service again: it names the newest backup.", 60),
}


class StoreUnavailableError(UserError):
    """The database cannot be used now; what was committed before is whole.

    kind: BUSY, FULL (also errors of the disk), CLOSED (not readable or writable) or DAMAGED. retry_after:
    seconds after which another try makes sense.
    """

    def __init__(self, path: Path, kind: str, detail: str = ""):
        problem, fix, self.retry_after = WORDS[kind]
        self.kind, self.detail = kind, detail
        code = CHECKPOINT if kind == DAMAGED else DISK
        super().__init__(f"{path}: {problem}{f' ({detail})' if detail else ''}.", fix, code)


class Database:
    """Connections to the database of a data folder; thread-safe. Nothing is opened until it is used."""

    def __init__(self, folder: Path, patience: float = PATIENCE):
        self.folder, self.path, self.patience = folder, folder / NAME, patience
        self._engine = sqlalchemy.create_engine(
            sqlalchemy.URL.create("sqlite", database=str(self.path)),
            connect_args={"timeout": patience},  # SQLite itself waits so long for a lock
            pool_size=CONNECTIONS,
            max_overflow=0,
            pool_timeout=patience,
            hide_parameters=True,  # no digest of a key in the text of an error
        )
        sqlalchemy.event.listen(self._engine, "connect", _connected)
        sqlalchemy.event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(immediate=True)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlalchemy.Connection]:
        """A transaction that sees one state of the database. Raises StoreUnavailableError."""
        with self._transaction(self._engine) as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlalchemy.Connection]:
        """A transaction that no other writer interrupts; it is on the disk when the block has ended.

        An error in the block undoes it. Raises StoreUnavailableError, and then nothing was changed.
        """
        with self._transaction(self._writer) as connection:
            yield connection

    @contextlib.contextmanager
    def _transaction(self, engine: sqlalchemy.Engine) -> Iterator[sqlalchemy.Connection]:
        tries = tenacity.Retrying(  # SQLite does not wait for each kind of lock
            stop=tenacity.stop_after_delay(self.patience),
            wait=tenacity.wait_fixed(PAUSE),
            retry=tenacity.retry_if_exception(lambda error: kind_of(error) == BUSY),
            reraise=True,
        )
        with self.errors(), contextlib.ExitStack() as stack:
            yield tries(lambda: stack.enter_context(engine.begin()))

    @contextlib.contextmanager
    def driver(self) -> Iterator[sqlite3.Connection]:
        """A connection of the module sqlite3, for what SQL cannot say. Raises StoreUnavailableError."""
        with self.errors(), contextlib.closing(self._engine.raw_connection()) as connection:
            driver: Any = connection.driver_connection
            yield driver

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Raise StoreUnavailableError in the place of SQLite's errors that say the database is not usable."""
        try:
            yield
        except (*FAILURES, sqlalchemy.exc.TimeoutError) as error:
            kind = kind_of(error)
            if kind is None:
                raise
            raise StoreUnavailableError(self.path, kind, _detail(error)) from error

    def create_private(self) -> None:
        """Create the file for its owner alone, if it is missing; the log beside it gets the same rights.

        Raises StoreUnavailableError.
        """
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            if self.path.stat().st_mode & 0o077:
                self.path.chmod(0o600)
        except OSError as error:
            kind = FULL if error.errno in system_files.REFUSED else CLOSED
            raise StoreUnavailableError(self.path, kind, error.strerror or "") from error

    def close(self) -> None:
        """Close all connections that no block uses any more."""
        self._engine.dispose()


def kind_of(error: BaseException) -> str | None:
    """The kind of StoreUnavailableError that an error of SQLite means; None for a mistake in a statement."""
    if isinstance(error, sqlalchemy.exc.TimeoutError):  # all connections were in use
        return BUSY
    if isinstance(error, UnicodeDecodeError):  # SQLite's message quotes the damaged text
        return DAMAGED
    origin = getattr(error, "orig", None) or error
    code = getattr(origin, "sqlite_errorcode", None)
    if code is None:  # the module sqlite3 itself found a value that is no UTF-8
        return DAMAGED if isinstance(origin, sqlite3.OperationalError) else None
    return KINDS.get(code & 0xFF)


def _detail(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or "")


def _connected(driver: sqlite3.Connection, _: object) -> None:
    """Prepare a new connection. Raises sqlite3.OperationalError where there can be no write-ahead log."""
    driver.isolation_level = None  # transactions begin where _begin says so, not where sqlite3 thinks
    ((mode,),) = driver.execute("PRAGMA journal_mode=WAL").fetchall()
    if mode != "wal":
        raise sqlite3.OperationalError(f"no write-ahead log here, only {mode}")
    for pragma in PRAGMAS:
        driver.execute(f"PRAGMA {pragma}")


def _begin(connection: sqlalchemy.Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
