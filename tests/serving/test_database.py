"""The database: locked, full, damaged, newer or killed, it loses nothing that was committed, and says so."""

import contextlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from onecard.errors import UserError
from onecard.serving import backups, schema, tables
from onecard.serving import database as serving_database
from onecard.serving import store as serving_store
from onecard.serving.database import StoreUnavailableError
from onecard.serving.keys import Key, Keys
from tests.support import small_disk
from tests.support.paths import ROOT

FORK = multiprocessing.get_context("fork")
PAGE = 4096  # bytes of the database
MIB = 1 << 20


@pytest.fixture
def data(tmp_path) -> Path:
    return tmp_path / "data"


def with_keys(data: Path, count: int) -> list[str]:
    """The texts of new keys in a data folder, which the service has started in once before."""
    with serving_store.served(data) as store:
        secrets = [store.keys.create(f"user {number}", ["chat"])[1] for number in range(count)]
    return secrets


def valid(data: Path, secrets: list[str]) -> list[bool]:
    with serving_store.opened(data) as store:
        return [isinstance(store.keys.find(secret), Key) for secret in secrets]


def refusal(data: Path) -> str:
    with pytest.raises(UserError) as error, serving_store.opened(data):
        pass
    assert not isinstance(error.value, StoreUnavailableError)
    return str(error.value)


# what is promised of the file


def test_a_commit_is_on_the_disk(data):
    """Write-ahead log, synchronous FULL, references checked, on every connection."""
    with serving_store.opened(data) as store, contextlib.ExitStack() as stack:
        for number in range(serving_database.CONNECTIONS):
            transaction = store.database.reading if number else store.database.writing
            connection = stack.enter_context(transaction())
            pragmas = ("journal_mode", "synchronous", "foreign_keys")
            values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
            assert values == ["wal", 2, 1]


def test_only_the_owner_may_read_it(data):
    """Under a generous umask too: database, log and copies."""
    old = os.umask(0)
    try:
        with serving_store.served(data) as store:
            store.keys.create("alice", ["chat"])
            paths = [*data.glob("onecard.db*"), *data.glob("backups/*.db")]
            assert len(paths) == 4
            assert {path.stat().st_mode & 0o777 for path in paths} == {0o600}
            assert [path.stat().st_mode & 0o777 for path in (data, data / "backups")] == [0o700, 0o700]
    finally:
        os.umask(old)
    (data / "onecard.db").chmod(0o644)
    with serving_store.opened(data):
        assert (data / "onecard.db").stat().st_mode & 0o777 == 0o600


def test_no_key_is_in_any_file(data, capsys):
    """A2: of 100 keys neither the database, its log, the copies, the list nor an error has the text."""
    with serving_store.served(data) as store:
        secrets = [store.keys.create(f"user {number}", ["chat"])[1] for number in range(100)]
        for number in range(0, 100, 3):
            secrets.append(store.keys.rotate(f"user {number}")[1])
            store.keys.revoke(f"user {number}")
        assert store.back_up(time.time() + 86400)
        with pytest.raises(UserError) as error:
            store.keys.create("user 1", ["chat"])
        shown = repr(store.keys.entries()) + repr(error.value) + repr(error.value.__cause__)
        files = [path for path in data.rglob("*") if path.is_file()]
        contents = b"".join(path.read_bytes() for path in files) + shown.encode()
        assert {"onecard.db", "onecard.db-wal"} <= {path.name for path in files}
    assert [secret for secret in secrets if secret.encode() in contents] == []
    assert [secret for secret in secrets if secret[8:28].encode() in contents] == [], "not even a part"
    assert secrets[-1][:8].encode() in contents


def test_an_error_of_a_statement_hides_its_values(data):
    """A2, A17: the text of an error of SQLAlchemy has no digest in it."""
    with serving_store.opened(data) as store:
        _, secret = store.keys.create("alice", ["chat"])
        with store.database.reading() as connection:
            row = connection.execute(sqlalchemy.select(tables.KEYS)).one()
        with pytest.raises(sqlalchemy.exc.IntegrityError) as error, store.database.writing() as connection:
            connection.execute(tables.KEYS.insert().values(**row._mapping))
    assert row.digest not in str(error.value)
    assert secret not in str(error.value)


# locked


class Writer:
    """Another process that holds the database for writing."""

    def __init__(self, path: Path, seconds: float):
        code = (
            "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1], isolation_level=None); "
            "c.execute('BEGIN IMMEDIATE'); print('held', flush=True); time.sleep(float(sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, str(path), str(seconds)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self.process.stdout.readline() == b"held\n"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_a_short_lock_is_waited_for(data):
    """A12: no commit is lost, and none fails."""
    with serving_store.opened(data, patience=20) as store:
        writer = Writer(store.database.path, 1)
        _, secret = store.keys.create("alice", ["chat"])
        writer.end()
    assert valid(data, [secret]) == [True]


def test_a_long_lock_is_an_error_with_a_time_to_come_back(data):
    """A12: after the patience, and nothing is stored; readers do not wait, and later it works again."""
    with serving_store.opened(data, patience=0.5) as store:
        _, old = store.keys.create("old", ["chat"])
        writer = Writer(store.database.path, 60)
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError) as error:
            store.keys.create("alice", ["chat"])
        assert 0.4 < time.monotonic() - began < 10
        assert (error.value.kind, error.value.retry_after) == (serving_database.BUSY, 5)
        assert isinstance(store.keys.find(old), Key)
        writer.end()
        assert [entry.key.name for entry in store.keys.entries()] == ["old"]
        store.keys.create("alice", ["chat"])


def test_threads_that_get_no_connection_are_told(data):
    with serving_store.opened(data, patience=0.2) as store, contextlib.ExitStack() as stack:
        for _ in range(serving_database.CONNECTIONS):
            stack.enter_context(store.database.reading())
        with pytest.raises(StoreUnavailableError) as error:
            store.keys.entries()
    assert error.value.kind == serving_database.BUSY


# full, or not writable


def fill_up(store: serving_store.Store) -> list[str]:
    """Create keys until the disk is full; the texts of those that were created."""
    secrets: list[str] = []

    def create() -> None:
        for number in range(10_000):
            secrets.append(store.keys.create(f"filling {number}", ["chat"])[1])

    with pytest.raises(StoreUnavailableError) as error:
        create()
    assert error.value.kind == serving_database.FULL
    return secrets


def on_a_small_disk(data: Path) -> None:
    data.mkdir()
    small_disk.mount(data, 2 * MIB)
    with serving_store.opened(data / "data") as store:
        small_disk.fill(data, 4 * PAGE)
        secrets = fill_up(store)
        assert [isinstance(store.keys.find(secret), Key) for secret in secrets] == [True] * len(secrets)
        (data / small_disk.BALLAST).unlink()
        secrets.append(store.keys.create("later", ["chat"])[1])
    assert valid(data / "data", secrets) == [True] * len(secrets)
    print("lost commits: 0 of", len(secrets))


def under_a_limit(data: Path) -> None:
    with serving_store.opened(data) as store:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (128 * 1024, before[1]))
        secrets = fill_up(store)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        secrets.append(store.keys.create("later", ["chat"])[1])
    assert valid(data, secrets) == [True] * len(secrets)
    print("lost commits: 0 of", len(secrets))


@pytest.mark.parametrize("work", [on_a_small_disk, under_a_limit])
def test_a_full_disk_loses_no_commit(data, tmp_path, work):
    """A12: each key that was shown is valid, the others do not exist, and with room it goes on."""

    def child() -> None:
        try:
            work(data)
        except small_disk.NoMountError as error:
            print(f"no mounts: {error}")
            raise SystemExit(77) from error

    code = small_disk.in_child(child, tmp_path / "output")
    output = (tmp_path / "output").read_text(encoding="utf-8")
    if code == 77:
        pytest.skip("no mounts of one's own here")
    assert code == 0, output
    assert re.search(r"lost commits: 0 of [1-9]", output)


def test_a_file_that_cannot_be_opened_is_named(data):
    (data / "onecard.db").mkdir(parents=True)
    with pytest.raises(StoreUnavailableError, match="cannot be opened") as error, serving_store.opened(data):
        pass
    assert error.value.kind == serving_database.CLOSED


# damaged


def test_every_damaged_page_is_noticed(data):
    """A12: each page in turn is inverted. The start is refused, and the message names the backup."""
    secrets = with_keys(data, 60)
    (backup,) = backups.every(data)
    whole = (data / "onecard.db").read_bytes()
    assert len(whole) >= 8 * PAGE
    for start in range(0, len(whole), PAGE):
        page = bytes(255 - byte for byte in whole[start : start + PAGE])
        (data / "onecard.db").write_bytes(whole[:start] + page + whole[start + PAGE :])
        message = refusal(data)
        assert "is damaged" in message
        assert str(backup) in message
    (data / "onecard.db").write_bytes(whole)
    assert valid(data, secrets) == [True] * 60


@pytest.mark.parametrize("size", [0, 100, PAGE, 5 * PAGE, -1])
def test_a_cut_or_lost_database_is_not_replaced(data, size):
    """A12: it is no first start, since that would forget all keys and make a new admin key."""
    with_keys(data, 60)
    path = data / "onecard.db"
    path.unlink() if size < 0 else os.truncate(path, size)
    message = refusal(data)
    assert str(backups.every(data)[0]) in message
    with pytest.raises(UserError, match="backup"), serving_store.served(data):
        pass


def test_the_commands_of_the_message_restore_the_backup(data):
    """They are run as printed; keys of the time of the backup are valid again, and the old file is kept."""
    with serving_store.served(data) as store:
        _, secret = store.keys.create("alice", ["chat"])
        store.back_up(time.time() + 86400)
        _, later = store.keys.create("bob", ["chat"])
    os.truncate(data / "onecard.db", 5000)
    message = refusal(data)
    subprocess.run(["bash", "-c", message.partition("run: ")[2].splitlines()[0]], check=True)
    assert valid(data, [secret, later]) == [True, False]
    assert (data / "onecard.db.damaged").stat().st_size == 5000
    assert schema.RESTORED in message


def test_flipped_bits_end_in_an_answer_or_a_message(data):
    """A12: 150 random bits; SQLite has no checksums, so a change of a value may pass, but nothing breaks."""
    secrets = with_keys(data, 30)
    whole, generator, noticed = (data / "onecard.db").read_bytes(), random.Random(0), 0
    for _ in range(150):
        changed = bytearray(whole)
        changed[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        (data / "onecard.db").write_bytes(changed)
        try:
            valid(data, secrets[:3])
        except UserError:
            noticed += 1
    assert noticed > 10


def test_a_database_of_others_is_left_alone(data):
    data.mkdir()
    with contextlib.closing(sqlite3.connect(data / "onecard.db")) as other, other:
        other.execute("CREATE TABLE notes (text)")
    before = (data / "onecard.db").stat().st_size
    assert "another program" in refusal(data)
    assert (data / "onecard.db").stat().st_size == before


# killed


def test_a_kill_at_any_moment_loses_no_commit(data):
    """A12, A13: keys that another process has shown are valid after its SIGKILL, and the file is whole."""
    code = (
        "import sys, pathlib; from onecard.serving import store\n"
        "with store.opened(pathlib.Path(sys.argv[1])) as opened:\n"
        "    for number in range(10_000):\n"
        "        print(opened.keys.create(f'{sys.argv[2]} {number}', ['chat'])[1], flush=True)\n"
    )
    secrets: list[str] = []
    for number in range(3):
        command = [sys.executable, "-c", code, str(data), f"user {number}"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        for _ in range(7 + 5 * number):
            secrets.append(child.stdout.readline().strip())
        child.kill()
        secrets += [line for line in child.stdout.read().split("\n")[:-1] if line]
        child.wait()
        child.stdout.close()
        assert valid(data, secrets) == [True] * len(secrets)


# the schema, and newer versions


def test_the_migrations_make_the_tables_that_are_declared(data):
    with serving_store.opened(data) as store, store.database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.METADATA) == []
        script = "SELECT sql FROM sqlite_master WHERE name IN ('keys', 'keys_live_name', 'blobs')"
        migrated = [" ".join(row[0].split()) for row in connection.exec_driver_sql(script)]
    declared = sqlalchemy.create_engine("sqlite://")
    tables.METADATA.create_all(declared)
    with declared.connect() as connection:
        expected = [" ".join(row[0].split()) for row in connection.exec_driver_sql(script)]
    assert sorted(map(normal, migrated)) == sorted(map(normal, expected))


def normal(statement: str) -> str:
    """A statement in which the order of the parts between commas does not count."""
    return " ".join(sorted(re.split(r"[,\s()]+", statement)))


@pytest.fixture
def newer(tmp_path, monkeypatch) -> Path:
    """The folder of migrations of an imaginary newer version, which adds a table."""
    folder = tmp_path / "migrations"
    shutil.copytree(schema.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions/0002_newer.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\nrevision, down_revision = '0002', '0001'\n"
        "def upgrade():\n    op.create_table('more', sa.Column('id', sa.Text, primary_key=True))\n",
        encoding="utf-8",
    )
    return folder


def test_a_migration_backs_up_first(data, newer, monkeypatch):
    secrets = with_keys(data, 3)
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    assert valid(data, secrets) == [True] * 3
    copies = backups.every(data)
    assert {backups.revision_of(path) for path in copies} == {"0001"}
    with contextlib.closing(sqlite3.connect(copies[0])) as copy:
        assert copy.execute("SELECT count(*) FROM keys").fetchone() == (3,)


def test_a_migration_that_fails_changes_nothing(data, newer, monkeypatch):
    """It is one transaction, also for tables."""
    secrets = with_keys(data, 3)
    (newer / "versions/0003_broken.py").write_text(
        "from alembic import op\nimport sqlalchemy as sa\nrevision, down_revision = '0003', '0002'\n"
        "def upgrade():\n    op.drop_table('keys')\n    raise ZeroDivisionError\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(schema, "MIGRATIONS", newer)
    with pytest.raises(ZeroDivisionError), serving_store.opened(data):
        pass
    monkeypatch.undo()
    assert valid(data, secrets) == [True] * 3


def test_a_newer_database_is_refused(data, newer, monkeypatch):
    """A12: the message names the newest backup that this version can read."""
    secrets = with_keys(data, 3)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", newer)
        with serving_store.served(data) as store:
            store.back_up(time.time() + 86400)
    copies = backups.every(data)
    assert [backups.revision_of(path) for path in copies][:2] == ["0002", "0001"]
    message = refusal(data)
    assert "newer version of OneCard (schema 0002)" in message
    assert str(copies[1]) in message
    subprocess.run(["bash", "-c", message.partition("run: ")[2].splitlines()[0]], check=True)
    assert valid(data, secrets) == [True] * 3


def test_a_running_service_keeps_its_schema(data, newer, monkeypatch):
    """A newer version's command for keys does not migrate under it, and a second service is refused."""
    with serving_store.served(data), monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", newer)
        assert f"process {os.getpid()} is serving from there" in refusal(data)
        with pytest.raises(UserError, match="is serving from there"), serving_store.served(data):
            pass
    with serving_store.served(data):
        pass


def test_processes_that_open_it_first_agree(data):
    """Many at once: one creates the tables, and all of them see these."""
    results: list[object] = []

    def work() -> None:
        with serving_store.opened(data) as store:
            results.append(Keys(store.database).entries())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [[]] * 6


# copies


def test_copies_are_few_and_one_a_day(data):
    """The newest seven, and the newest of each older schema; a start makes one if the day has none."""
    day, begin = 86400, 20_000 * 86400
    with serving_store.opened(data) as store:
        backups.write(store.database, "0000", begin - day)
        written = [store.back_up(begin + number * day / 4) for number in range(60)]
    assert sum(path is not None for path in written) == 15
    copies = backups.every(data)
    assert [backups.revision_of(path) for path in copies] == ["0001"] * backups.KEPT + ["0000"]
    assert copies[: backups.KEPT] == [path for path in written if path][: -backups.KEPT - 1 : -1]
    assert {path.name for path in (data / "backups").iterdir()} == {path.name for path in copies}


def test_a_copy_is_whole_while_others_write(data):
    """Its integrity is checked while a thread goes on creating keys; what a killed copy left is deleted."""
    with serving_store.served(data) as store:
        (data / "backups/.onecard-20200101T000000Z-0001.db.tmp-journal").touch()
        is_done = threading.Event()

        def create() -> None:
            number = 0
            while not is_done.is_set():
                store.keys.create(f"user {number}", ["chat"])
                number += 1

        thread = threading.Thread(target=create)
        thread.start()
        copies = [store.back_up(time.time() + number * 86400) for number in range(1, 5)]
        is_done.set()
        thread.join(60)
        for path in copies:
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as copy:
                assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
                assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert not list((data / "backups").glob(".*"))
