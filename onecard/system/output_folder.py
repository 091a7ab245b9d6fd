"""The folder that a tool makes: where it can be, what it was made of, and whether it exists already.

It appears whole (whole_folder.py). A record inside says what it was made of, so that the same command once
more finds that there is nothing to do. The folder's files are known by size and time: a SHA-256 would take
another reading of a model that no longer is in memory.

A GGUF file is made in a folder beside it too, and put there by one rename (`converting`, files.put_file).
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, DISK, UserError, listed
from onecard.system import files as system_files
from onecard.system import lock, whole_folder

RECORD, VERSIONS = "onecard.json", "versions"  # versions are recorded but not compared, since the files are
OLD_LEFTOVERS = ".onecard-gguf-*"  # the folders in which older versions of OneCard converted a model
PATIENCE = 5.0  # seconds: the child of a killed run needs a moment to see it


def check_apart(source: Path, target: Path, flags: tuple[str, str]) -> None:
    """Raise UserError when one folder is the other or lies inside of it; links are followed."""
    one, other = source.resolve(), find(target, flags[1])
    if one == other or one in other.parents or other in one.parents:
        problem = f"{flags[1]} {target} is {flags[0]} {source}, or one of the two lies inside of the other."
        raise UserError(problem, "Name a new folder elsewhere.")


def record(
    program: str, settings: dict[str, Any], sources: Iterable[Path], versions: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a folder is made of: the program, its settings, and files with their sizes and times.

    versions: option -> version of the folder that it names, None where that does not come from the hub.
    """
    stamps = {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in sources}
    noted = {VERSIONS: {name: str(version) for name, version in (versions or {}).items() if version}}
    return {"program": program, "settings": settings, "from": dict(sorted(stamps.items())), **noted}


def find(target: Path, flag: str) -> Path:
    """Where a folder really is or will be, links followed.

    Raises UserError where none can be: exit 2, or 7 when the system says so.
    """
    try:
        place = target.resolve()
        if place.is_symlink():
            raise RuntimeError("links in a circle")  # as Python says it before 3.13
        there = next(path for path in (place, *place.parents) if path.exists())
    except RuntimeError:
        raise UserError(f"{flag} {target}: its links lead nowhere.", "Name a new folder.") from None
    except OSError as error:
        problem = f"{flag} {target}: the folder cannot be created there: {error.strerror}."
        raise UserError(problem, "Choose another.", DISK) from None
    if there != place and not there.is_dir():
        raise UserError(f"{flag} {target}: {there} is a file.", "Name a new folder elsewhere.")
    return place


def is_made(target: Path, made_of: dict[str, Any], flag: str) -> bool:
    """Whether the folder is there already, made of the same; its files are known by their sizes and times.

    Raises UserError: exit 2 when something else is there, or none can come there; 4 when a file has changed.
    """
    place = find(target, flag)
    changed = None
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        stored = json.loads((place / RECORD).read_text(encoding="utf-8"))
        files, stamps = stored.pop("files"), _stamps(place)
        now: Mapping[str, int | list[int]] = stamps
        if all(isinstance(size, int) for size in files.values()):  # an earlier version recorded no times
            now = {name: size for name, (size, _) in stamps.items()}
        if {**stored, VERSIONS: {}} == {**made_of, VERSIONS: {}}:
            changed = sorted(name for name in {*files, *now} if files.get(name) != now.get(name))
    if changed:
        problem = f"{flag} {target} was made of the same files, but {listed(changed)} changed, came or went"
        problem += " since. A copy has to keep the times of its files (cp -a)."
        raise UserError(problem, "Name a new folder, or delete this one to make it again.", CHECKPOINT)
    if changed is None:
        check_free(place, target, flag)
    return changed is not None


def check_free(place: Path, target: Path, flag: str) -> None:
    """Raise UserError (exit 2) unless a new folder can be put there; place: of `find`."""
    check_movable(place, target, flag)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{flag} {target} is there already.", "Name a new folder.")


def check_movable(place: Path, target: Path, flag: str) -> None:
    """Raise UserError (exit 2) when no rename can put a new folder there."""
    if not place.exists():
        return
    what = "the current folder" if place.samefile(Path()) else "a mount point" if _is_mount(place) else None
    if what:
        problem = f"{flag} {target} is {what}, which a new folder cannot replace."
        raise UserError(problem, "Name a new folder inside it.")


def _is_mount(place: Path) -> bool:
    """Also one of the same file system, which only Linux' own list tells."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
        names = {re.sub(rb"\\(\d{3})", lambda at: bytes([int(at[1], 8)]), line.split()[4]) for line in lines}
        return os.fsencode(place) in names
    return os.path.ismount(place)


@contextlib.contextmanager
def making(target: Path, needed: int, made_of: dict[str, Any], flag: str) -> Iterator[tuple[Path, int]]:
    """(A new folder to fill, the descriptor of its lock); it becomes `target` when the block ends well.

    needed: bytes. Raises UserError: exit 7 when they are not free, 2 when another process makes it.
    """
    end = find(target, flag)
    with contextlib.ExitStack() as stack:
        try:
            place, descriptor = stack.enter_context(whole_folder.stage(end, PATIENCE))
        except TimeoutError:
            raise UserError(f"{flag} {target}: another process is making it.", "Wait for it.") from None
        except OSError as error:
            problem = f"{flag} {target}: {end.parent} cannot be written: {error.strerror}."
            raise UserError(problem, "Choose another.", DISK) from None
        try:
            _check_room(place, needed, target, flag)
            with system_files.os_errors():
                yield place, descriptor
            whole_folder.put(place, end, lambda: _write_record(place, made_of))
        except OSError as error:
            problem = f"{flag} {target} could not be written: {error.strerror or error}."
            raise UserError(problem, "Free space on the disk or check your permissions.", DISK) from None


def _write_record(place: Path, made_of: dict[str, Any]) -> None:
    """After the sync, which may set the times of files on a server."""
    content = json.dumps({**made_of, "files": _stamps(place)}, indent=2) + "\n"
    system_files.replace(place / RECORD, content.encode())


def _check_room(place: Path, needed: int, target: Path, flag: str) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        problem = f"{flag} {target}: needs {needed >> 20} MiB, free: {free >> 20} MiB."
        raise UserError(problem, "Free space on the disk, or choose another one.", DISK)


def _stamps(folder: Path) -> dict[str, list[int]]:
    """Size and time of each file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    statuses = {str(path.relative_to(folder)): path.stat() for path in paths}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in statuses.items()}


@contextlib.contextmanager
def converting(output: Path, source: Path) -> Iterator[tuple[Path, int]]:
    """(A folder beside the output to work in, the descriptor of its lock), for one conversion at a time.

    source: what is converted. Raises UserError (exit 7) when the disk is full or cannot be written.
    """
    try:
        # its absolute path, as the child has a working folder of its own
        with whole_folder.stage(output.parent.resolve() / output.name) as (place, descriptor):
            _delete_old_leftovers(place.parent)
            yield place, descriptor
    except OSError as error:
        problem = f"{source}: its GGUF file could not be stored in {output.parent}: {error.strerror}."
        raise UserError(problem, "Free space on the disk or check your permissions.", DISK) from None


def _delete_old_leftovers(parent: Path) -> None:
    """Delete what killed conversions of older versions left: each holds as many bytes as the model.

    An older version locks the parent folder while it converts, and nothing is deleted meanwhile.
    """
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        if lock.take(descriptor):
            for leftover in parent.glob(OLD_LEFTOVERS):
                shutil.rmtree(leftover)
    finally:
        os.close(descriptor)
