"""Stored files: the row is there exactly when the file is whole, whatever stopped the process, and when."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import sqlalchemy

from onecard.serving import database as serving_database
from onecard.serving import store as serving_store
from onecard.serving.blobs import Blobs, NoBlobError
from onecard.serving.database import StoreUnavailableError
from onecard.serving.tables import BLOBS
from onecard.system import files as system_files
from tests.support import faults, small_disk
from tests.support.system_calls import traced

OLD, NEW = b"old" * 5000, b"new" * 50_000


@pytest.fixture
def store(tmp_path):
    with serving_store.served(tmp_path / "data") as store:
        yield store


def rows(store: serving_store.Store) -> set[str]:
    with store.database.reading() as connection:
        return set(connection.execute(sqlalchemy.select(BLOBS.c.id)).scalars())


def files(store: serving_store.Store) -> set[str]:
    return {path.name for path in store.blobs.folder.iterdir()} if store.blobs.folder.exists() else set()


def read(store: serving_store.Store, name: str, owner: str = "alice") -> bytes:
    with store.blobs.open(name, owner) as file:
        return file.read()


def test_what_is_stored_comes_back_until_it_is_deleted(store):
    name = store.blobs.store([b"a", b"", b"bc"], "alice")
    empty = store.blobs.store([], "alice")
    assert (read(store, name), read(store, empty)) == (b"abc", b"")
    assert (store.blobs.folder / name).stat().st_mode & 0o777 == 0o600
    store.blobs.delete(name, "alice")
    with pytest.raises(NoBlobError):
        store.blobs.open(name, "alice")
    assert rows(store) == files(store) == {empty}


def test_files_of_another_owner_are_as_good_as_missing(store):
    """A4, the cell of stored files: reading and deleting."""
    name = store.blobs.store([OLD], "alice")
    for attempt in (store.blobs.open, store.blobs.delete):
        with pytest.raises(NoBlobError):
            attempt(name, "bob")
    assert read(store, name) == OLD


@pytest.mark.parametrize("name", ["", ".", "..", "../onecard.db", "/etc/passwd", "a\0b", "file-' OR 1=1 --"])
def test_an_id_is_no_path(store, name):
    """A14, A15: an id that no row has opens and deletes nothing."""
    store.blobs.store([OLD], "alice")
    for attempt in (store.blobs.open, store.blobs.delete):
        with pytest.raises(NoBlobError):
            attempt(name, "alice")
    assert len(rows(store)) == 1


# killed


def prepared(folder: Path) -> tuple[Path, str]:
    """A data folder with one stored file, and its id."""
    with serving_store.served(folder / "data") as store:
        return folder / "data", store.blobs.store([OLD], "alice")


def work(data: Path, old: str) -> None:
    """What is stopped at each step: a file is stored, then another one is deleted."""
    database = serving_database.Database(data)
    blobs = Blobs(database)
    blobs.store([NEW[:1000], NEW[1000:]], "alice")
    blobs.delete(old, "alice")
    database.close()


def check_agreement(data: Path, old: str, is_done: bool) -> None:
    """After the next start, each row has a whole file and each file a row; all that was done is there."""
    with serving_store.served(data) as store:
        assert store.collected.lost == ()
        assert rows(store) == files(store)
        contents = {name: read(store, name) for name in rows(store)}
        assert set(contents.values()) <= {OLD, NEW}
        assert len(contents) == len(set(contents.values()))
        assert old not in contents or contents[old] == OLD
        assert contents, "there is no moment at which the old one is gone before the new one is there"
        if is_done:
            assert list(contents.values()) == [NEW]


def attempts(tmp_path: Path, attempt) -> int:
    """Try `attempt(data, old, number)` until it is not killed; the number of kills."""
    for number in range(1, 500):
        folder = tmp_path / str(number)
        data, old = prepared(folder)
        code = attempt(data, old, number)
        assert code in (0, -signal.SIGKILL)
        check_agreement(data, old, code == 0)
        shutil.rmtree(folder)
        if code == 0:
            return number - 1
    raise AssertionError("it never ends")


def test_a_kill_at_any_file_operation_leaves_rows_and_files_in_agreement(tmp_path):
    """A13: before each opening, sync, rename and deletion by our own code."""

    def attempt(data: Path, old: str, number: int) -> int:
        def dying() -> None:
            faults.kill_at_operation(number)
            work(data, old)

        return small_disk.in_child(dying, tmp_path / "output")

    assert attempts(tmp_path, attempt) >= 6


@pytest.mark.ci
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace (Debian package strace)")
@pytest.mark.parametrize("call", ["openat", "pwrite64", "write", "fsync,fdatasync", "rename", "unlink"])
def test_a_kill_at_any_system_call_leaves_rows_and_files_in_agreement(tmp_path, call):
    """A13: seen from outside of Python, and so inside of SQLite's commits too."""

    def attempt(data: Path, old: str, number: int) -> int:
        return traced(lambda: work(data, old), f"{call}:signal=SIGKILL:when={number}")

    assert attempts(tmp_path, attempt) >= 1


# other failures


@pytest.mark.parametrize("function", ["put_file", "sync_folder"])
def test_an_error_of_the_disk_stores_nothing(store, monkeypatch, function):
    """A12: the caller gets one typed error, and nothing stays behind."""

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(system_files, function, full)
        with pytest.raises(StoreUnavailableError) as error:
            store.blobs.store([NEW], "alice")
    assert error.value.kind == serving_database.FULL
    assert rows(store) == files(store) == set()


def test_an_interrupted_upload_stores_nothing(store):
    def parts():
        yield NEW
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.blobs.store(parts(), "alice")
    assert rows(store) == files(store) == set()


def test_a_database_that_is_busy_stores_nothing(tmp_path):
    with serving_store.opened(tmp_path / "data", patience=0.2) as store:
        other = serving_database.Database(tmp_path / "data")
        with other.writing(), pytest.raises(StoreUnavailableError) as error:
            store.blobs.store([NEW], "alice")
        other.close()
        assert error.value.kind == serving_database.BUSY
        assert rows(store) == files(store) == set()


def test_lost_and_cut_files_are_reported(tmp_path):
    """A13: at the next start, by their ids; they are not served, and can be deleted."""
    with serving_store.served(tmp_path / "data") as store:
        names = [store.blobs.store([OLD], "alice") for _ in range(3)]
        (store.blobs.folder / names[0]).unlink()
        os.truncate(store.blobs.folder / names[1], 7)
        (store.blobs.folder / "stray").touch()
    with serving_store.served(tmp_path / "data") as store:
        assert store.collected.lost == tuple(sorted(names[:2]))
        assert store.collected.deleted == 1
        for name in names[:2]:
            with pytest.raises(NoBlobError):
                store.blobs.open(name, "alice")
            store.blobs.delete(name, "alice")
        assert read(store, names[2]) == OLD
        assert rows(store) == files(store)
