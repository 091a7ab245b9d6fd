"""One trainer per run folder: a lock that the system gives back when its owner dies, however it dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from onecard.errors import UserError

NAME = ".lock"


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Own the run folder while the block runs; raises UserError naming the owner's pid.

    The folder is made when it is missing, and goes again when the block leaves it empty.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _take(handle, folder)
            if os.path.samestat(os.fstat(handle), path.stat()):  # else its owner deleted it meanwhile
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty
            for made in missing:
                made.rmdir()


def check_free(folder: Path) -> None:
    """Raise UserError when another process owns the run folder; writes nothing."""
    try:
        handle = os.open(folder / NAME, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        _take(handle, folder, fcntl.LOCK_SH)  # several may ask at the same time
    finally:
        os.close(handle)


def _take(handle: int, folder: Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(handle, 20, 0).decode() or "unknown"
        problem = f"{folder}: process {owner} is training there."
        raise UserError(problem, "Wait for it, stop it, or choose another --output_path.") from None
