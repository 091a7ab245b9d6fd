"""Checks before the database is used, and migrations by alembic: it is whole and has today's tables."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from onecard.errors import CHECKPOINT, UserError, first_line
from onecard.serving import backups
from onecard.serving import database as serving_database
from onecard.serving.database import Database
from onecard.serving.tables import METADATA
from onecard.system import lock

MIGRATIONS = Path(__file__).parent / "migrations"
SERVES = "is serving from there"  # what the owner of a data folder does
RESTORED = "Keys that were revoked after the backup are valid again then, so revoke them again."


def prepare(database: Database, is_owner: bool, now: float) -> str:
    """Check the database, and create or migrate its tables after a backup. Returns the revision.

    One process at a time. is_owner: the caller holds the lock of the data folder, so no service is running.
    Raises UserError when it is damaged, newer than this version, of another program or lost, and
    StoreUnavailableError when it cannot be used now.
    """
    database.create_private()
    revisions, newest = known_revisions()
    with damage(database, revisions):
        check(database)
        current = revision(database)
        empty = is_empty(database)
        if current == newest:
            check_tables(database)
    if current is None and empty and backups.every(database.folder):
        raise UserError(f"{database.path} is empty or missing.", restoring(database, revisions), CHECKPOINT)
    if current is None and not empty:
        raise UserError(f"{database.path} is a database of another program.", "Choose another folder.")
    if current is not None and current not in revisions:
        raise UserError(
            f"{database.path} was written by a newer version of OneCard (schema {current}).",
            f"Use that version. {restoring(database, revisions)}",
            CHECKPOINT,
        )
    if current != newest:
        if current is not None:
            if not is_owner:
                lock.check_free(database.folder, SERVES)
            backups.write(database, current, now)
        migrate(database)
    return newest


@contextlib.contextmanager
def damage(database: Database, revisions: list[str]) -> Iterator[None]:
    """Raise UserError with the way to the newest backup where the block finds the database damaged."""
    try:
        yield
    except serving_database.StoreUnavailableError as error:
        if error.kind != serving_database.DAMAGED:
            raise
        reason = error.detail
    except serving_database.FAILURES as error:  # statements that are right for a whole database
        reason = first_line(getattr(error, "orig", None) or error)
    else:
        return
    problem = f"{database.path} is damaged: {' '.join(reason.split())}."
    raise UserError(problem, restoring(database, revisions), CHECKPOINT)


def check(database: Database) -> None:
    """Raise StoreUnavailableError when pages, indexes, constraints or references contradict each other.

    SQLite has no checksums: a value that changed on the disk, outside of any index, is not noticed.
    """
    with database.reading() as connection:
        results = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalars().all()
        strays = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if results != ["ok"] or strays:
        reason = str(results[-1]) if results != ["ok"] else "a reference leads nowhere"
        raise serving_database.StoreUnavailableError(database.path, serving_database.DAMAGED, reason)


def check_tables(database: Database) -> None:
    """Ask each table for a row with all its columns; raises an error of SQLite where something is missing."""
    with database.reading() as connection:
        for table in METADATA.sorted_tables:
            connection.execute(sqlalchemy.select(table).limit(1)).all()


def restoring(database: Database, revisions: list[str]) -> str:
    """What to type to go back to the newest backup that this version can read."""
    backup = backups.newest(database.folder, revisions)
    if backup is None:
        return "There is no backup that this version can read. To begin anew, use another data folder."
    path = shlex.quote(str(database.path))
    commands = f"mv {path} {path}.damaged; rm -f {path}-wal {path}-shm; cp {shlex.quote(str(backup))} {path}"
    return f"The newest backup is {backup}. End the service, then run: {commands}\n{RESTORED}"


def revision(database: Database) -> str | None:
    """The revision of the schema that the database has; None when alembic has not created it."""
    with database.reading() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def is_empty(database: Database) -> bool:
    """Whether the database has no tables at all."""
    with database.reading() as connection:
        return not sqlalchemy.inspect(connection).get_table_names()


def known_revisions() -> tuple[list[str], str]:
    """The revisions of the schema that this version of OneCard knows, and the newest of them."""
    scripts = ScriptDirectory.from_config(_configured(Config()))
    newest = scripts.get_current_head()
    assert newest is not None
    return [script.revision for script in scripts.walk_revisions()], newest


def migrate(database: Database) -> None:
    """Bring the tables to the newest revision, in one transaction."""
    with database.writing() as connection:
        command.upgrade(_configured(Config(attributes={"connection": connection})), "head")


def _configured(config: Config) -> Config:
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config
