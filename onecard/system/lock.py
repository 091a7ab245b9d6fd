"""Locks between the processes of one machine; the system gives a lock back when its owner dies.

Every lock is an flock on an open file or folder. The library filelock takes the exclusive ones, on
descriptors of our own: so a child process can inherit a lock, and a folder can be locked. Older versions of
OneCard lock the same files in the same way, so each version sees the locks of the other.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from onecard.errors import UserError
from onecard.system import files as system_files

NAME = ".lock"  # the file in a run folder that its trainer locks; it contains the process id of the trainer
TRAINS = "is training there"  # what the owner of a run folder does
TRIES, PAUSE = 10, 0.05  # how often `take_soon` tries, and seconds between two tries


def take(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file or folder exclusively, until all copies of its descriptor are closed.

    Returns False when it is locked already, by another process or another descriptor of this one; with `wait`
    it waits for that lock to end. Raises OSError where the file system has no locks.
    """
    return filelock.lock_descriptor(descriptor, blocking=wait)


def take_soon(descriptor: int) -> bool:
    """The same as `take`, tried again for half a second: `is_taken` holds a shared lock for a moment.

    Returns False when the file is still locked then.
    """
    for _ in range(TRIES):
        if take(descriptor):
            return True
        time.sleep(PAUSE)
    return False


def is_taken(path: Path) -> bool:
    """Whether a process holds the exclusive lock of a file; False without such a file. Nothing is written.

    To find out, it takes a shared lock for a moment, which filelock does not have: several processes can ask
    at the same time, where exclusive locks would make them see each other. Raises OSError when the file
    cannot be opened.
    """
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    return False


@contextlib.contextmanager
def held(path: Path, before_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a file while the block runs, and wait for it while another process holds it.

    The file and its folder are created when they are missing, and stay. `before_waiting` is called when the
    lock is not free. Raises OSError when the file cannot be created, or its file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        if not take(file.fileno()):
            before_waiting()
            take(file.fileno(), wait=True)
        yield


@contextlib.contextmanager
def owned(folder: Path, work: str = TRAINS) -> Iterator[None]:
    """Own a folder while the block runs; raises UserError naming the process that owns it, and its work.

    The folder is created when it is missing, and removed when the block leaves it empty. So is the lock file.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    system_files.make_folder(folder)
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not take_soon(descriptor):
                raise _is_busy(folder, work)
            if os.path.samestat(os.fstat(descriptor), path.stat()):  # else its last owner has deleted it
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except OSError as error:
            raise system_files.disk_error(path, error) from None
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for parent in missing:
                parent.rmdir()


def check_free(folder: Path, work: str = TRAINS) -> None:
    """Raise UserError when a process owns the folder, for this work; writes nothing."""
    if is_taken(folder / NAME):
        raise _is_busy(folder, work)


def owner_of(folder: Path) -> int | None:
    """The process id that the lock file of a run folder names, None without one; it may have died since."""
    try:
        return int((folder / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _is_busy(folder: Path, work: str) -> UserError:
    problem = f"{folder}: process {owner_of(folder) or 'unknown'} {work}."
    return UserError(problem)
