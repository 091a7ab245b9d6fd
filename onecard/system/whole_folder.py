"""The one way to make a folder appear whole: whoever looks finds it complete, or does not find it.

1. The files are written into another folder on the same file system, usually that of `stage`.
2. `put` syncs each of them to the disk, then has the manifest written, if there is one. So a manifest never
   names what a power failure can still take away.
3. One rename gives the folder its name, and its parent is synced.

A kill or a power failure at any moment leaves the target as it was, or whole. This file knows no options and
no formats.
"""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from onecard.system import files as system_files
from onecard.system import lock

PAUSE = 0.1  # seconds between two looks at a lock


@contextlib.contextmanager
def stage(
    target: Path, patience: float = math.inf, before_waiting: Callable[[], None] = lambda: None
) -> Iterator[tuple[Path, int]]:
    """(An empty folder beside `target` to write into, the descriptor of its lock), for one process at a time.

    It is called .NAME.making. What a killed process left in it is deleted first, and the folder itself at the
    end, unless `put` has renamed it. A child that inherits the descriptor keeps the lock when this process
    dies. What a library says of a full disk is raised as OSError.

    patience: seconds to wait while another process has it, after before_waiting(). Raises TimeoutError when
    that is not enough, and OSError when the folder cannot be created or locked.
    """
    folder = target.with_name(f".{target.name}.making")
    descriptor = _own(folder, patience, before_waiting)
    try:
        _empty(folder)
        with system_files.os_errors():
            yield folder, descriptor
    finally:
        if _is_at(folder, descriptor):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def put(
    folder: Path,
    target: Path,
    write_manifest: Callable[[], None] | None = None,
    replaced: Path | None = None,
    private: bool = False,
) -> None:
    """Sync a folder whose files are all written, and rename it to `target`.

    write_manifest: writes and syncs the file that says what the folder holds; it is called when all others
    are on the disk. replaced: where the folder that has the name so far goes, for the caller to delete;
    without it that folder has to be empty. private: the rights stay as they are, such as those of tempfile,
    which lets nobody else look inside; otherwise they follow the umask. Raises OSError, and FileExistsError
    is one.
    """
    if not private:
        system_files.follow_umask(folder)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            system_files.sync_folder(path) if path.is_dir() else system_files.sync_file(path)
    if write_manifest:
        write_manifest()
    system_files.sync_folder(folder)
    if replaced is not None and target.exists():
        target.rename(replaced)
    folder.rename(target)
    system_files.sync_folder(target.parent)


def _own(folder: Path, patience: float, before_waiting: Callable[[], None]) -> int:
    """Create and lock the folder; the lock of a killed process has ended, so its folder can be taken."""
    until, is_first = time.monotonic() + patience, True
    while True:
        system_files.make_folder(folder.parent)
        try:  # no link is followed: it may come with anybody's adapter, and its target would be emptied
            folder.mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # its last owner has deleted it in between
            continue
        except FileExistsError:
            if os.path.lexists(folder) and not folder.is_dir():  # else deleted in between, too
                raise
            continue
        except NotADirectoryError as error:
            raise NotADirectoryError(error.errno, f"{folder.name} is a link there") from None
        try:
            if lock.take(descriptor):
                if _is_at(folder, descriptor):
                    return descriptor
            elif time.monotonic() > until:
                raise TimeoutError(f"{folder} is locked by another process")
            else:
                if is_first:
                    before_waiting()
                is_first = False
                time.sleep(PAUSE)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(folder: Path, descriptor: int) -> bool:
    """Whether the open folder still has this name: its last owner may have renamed or deleted it."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.lstat())
    except FileNotFoundError:
        return False


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
