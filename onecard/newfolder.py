"""A folder that appears whole: made beside its place, synced, and put there by one rename.

What a killed run left is removed by the next. A record inside says what the folder was made of, so that the
same command once more finds that there is nothing to do.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from onecard import commits, runfolder
from onecard.errors import DISK, UserError

RECORD, VERSIONS = "onecard.json", "versions"  # the latter: told, not compared, as the files are
PATIENCE = 5.0  # seconds: the child of a killed run needs a moment to see it


def check_apart(source: Path, target: Path, flags: tuple[str, str]) -> None:
    """Raise UserError when one folder is the other or lies inside of it; links are followed."""
    one, other = source.resolve(), target.resolve()
    if one == other or one in other.parents or other in one.parents:
        problem = f"{flags[1]} {target}: is {flags[0]} {source}, or inside of it, or around it."
        raise UserError(problem, "Name a new folder elsewhere.")


def record(
    program: str, settings: dict[str, Any], sources: Iterable[Path], folders: Mapping[str, Path] | None = None
) -> dict[str, Any]:
    """What a folder is made of: the program, its settings, and files with their sizes and times.

    folders: option -> folder, whose version is noted where it comes from the hub.
    """
    found = {name: commits.of(folder) for name, folder in (folders or {}).items()}
    stamps = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in sources}
    noted = {VERSIONS: {name: str(version) for name, version in found.items() if version}}
    return {"program": program, "settings": settings, "from": dict(sorted(stamps.items())), **noted}


def is_made(target: Path, made_of: dict[str, Any], flag: str) -> bool:
    """Whether the folder is there already, made of the same; raises UserError when something else is."""
    if not target.exists() and not target.is_symlink():
        return False
    if target.is_dir() and not any(target.iterdir()):
        return False
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads((target / RECORD).read_text(encoding="utf-8"))
        files = known.pop("files")
        if {**known, VERSIONS: {}} == {**made_of, VERSIONS: {}} and files == _sizes(target):
            return True
    raise UserError(f"{flag} {target}: is there already.", "Name a new folder.")


@contextlib.contextmanager
def making(target: Path, needed: int, made_of: dict[str, Any], flag: str) -> Iterator[tuple[Path, int]]:
    """(A new folder to fill, the handle of its lock); it becomes `target` when the block ends well.

    needed: bytes. Raises UserError: exit 7 when they are not free, 2 when another process makes it.
    """
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    place = parent / f".{target.name}.making"
    handle = _own(place, target, flag)
    try:
        _empty(place)
        _check_room(place, needed, target, flag)
        yield place, handle
        content = {**made_of, "files": _sizes(place)}
        (place / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in place.rglob("*"):
            runfolder.sync_folder(path) if path.is_dir() else runfolder.sync_file(path)
        runfolder.sync_folder(place)
        place.rename(target)
        runfolder.sync_folder(parent)
    except BaseException as error:
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            problem = f"{flag} {target}: could not be made: {error.strerror or error}."
            raise UserError(problem, "Make room or check the rights.", DISK) from None
        raise
    finally:
        os.close(handle)


def _own(place: Path, target: Path, flag: str) -> int:
    """Lock the unfinished folder; a lock ends with its process, so a killed run's folder can be taken."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            place.mkdir(exist_ok=True)
            handle = os.open(place, os.O_RDONLY)
        except OSError as error:
            problem = f"{flag} {target}: cannot write in {place.parent}: {error.strerror}."
            raise UserError(problem, "Choose another.", DISK) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if place.exists() and os.path.samestat(os.fstat(handle), place.stat()):
                return handle
        except BlockingIOError:
            if time.monotonic() > until:
                os.close(handle)
                raise UserError(f"{flag} {target}: another process is making it.", "Wait for it.") from None
            time.sleep(0.1)
        os.close(handle)


def _empty(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _check_room(place: Path, needed: int, target: Path, flag: str) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        problem = f"{flag} {target}: needs {needed >> 20} MiB, free: {free >> 20} MiB."
        raise UserError(problem, "Make room or choose another disk.", DISK)


def _sizes(folder: Path) -> dict[str, int]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}
