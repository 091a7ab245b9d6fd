"""Locks between processes; older versions of OneCard take them with flock alone, as these tests do."""

import fcntl
import os
import threading

import pytest

from onecard.errors import UserError
from onecard.system import lock
from tests.support.paths import ROOT


def test_the_lock_of_an_older_version_is_seen(tmp_path):
    """A run that is locked by flock alone is busy, and its owner is named."""
    with (tmp_path / lock.NAME).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("123")
        file.flush()
        assert lock.is_taken(tmp_path / lock.NAME)
        for attempt in (lambda: lock.check_free(tmp_path), lambda: lock.owned(tmp_path).__enter__()):
            with pytest.raises(UserError, match="process 123 is training there"):
                attempt()
    lock.check_free(tmp_path)


def test_an_older_version_sees_the_lock(tmp_path):
    with lock.owned(tmp_path), (tmp_path / lock.NAME).open() as file:
        assert file.read() == str(os.getpid())
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not (tmp_path / lock.NAME).exists()


def test_asking_writes_nothing_and_hinders_nobody_who_asks(tmp_path):
    """It works where nothing can be written, and two processes may ask at the same moment."""
    lock.check_free(tmp_path / "missing")
    assert not lock.is_taken(tmp_path / "missing")
    (tmp_path / lock.NAME).write_text("1")
    before = (tmp_path / lock.NAME).stat()
    (tmp_path / lock.NAME).chmod(0o400)
    with (tmp_path / lock.NAME).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        lock.check_free(tmp_path)
    after = (tmp_path / lock.NAME).stat()
    assert (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size)
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_training_starts_while_somebody_asks_about_its_lock(tmp_path, monkeypatch):
    """Whoever asks holds a shared lock for a moment; the training tries again until it is released."""
    (tmp_path / lock.NAME).touch()
    with (tmp_path / lock.NAME).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        monkeypatch.setattr(lock.time, "sleep", lambda _: fcntl.flock(file, fcntl.LOCK_UN))
        with lock.owned(tmp_path):
            assert lock.owner_of(tmp_path) == os.getpid()


def test_who_waits_is_told_and_gets_the_lock(tmp_path):
    path, order = tmp_path / "new" / "file", []
    waiting = threading.Event()

    def wait() -> None:
        with lock.held(path, waiting.set):
            order.append("second")

    with lock.held(path, lambda: order.append("waited for nobody")):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert path.exists(), "the file stays, so that all wait for the same one"


def test_one_file_alone_calls_flock():
    """All other modules take locks from system/lock.py."""
    files = [
        path for path in (ROOT / "onecard").rglob("*.py") if "fcntl.flock" in path.read_text(encoding="utf-8")
    ]
    assert [path.relative_to(ROOT / "onecard").as_posix() for path in files] == ["system/lock.py"]
