"""The folder of a download: which files are there, what may be replaced, names, room on the disk, receipt.

This file knows no server: hub/transfer.py fetches the files, and hub/download.py decides what is done.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.errors import DISK, UserError
from onecard.hub import manifest, transfer
from onecard.hub.listing import Listing
from onecard.hub.transfer import SHA256, Remote
from onecard.system import files as system_files
from onecard.system import hashing, lock

SPARE = 1 << 24  # bytes that stay free


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Hold the lock of the folder; raises UserError when another download has it, exit 7 on a full disk."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.owned(folder))
        except UserError as error:
            if error.code == DISK:
                raise
            problem = f"{folder}: another download is at work there."
            raise UserError(problem, "Wait for it, or choose another --to.") from None
        try:
            yield
        except OSError as error:
            if error.errno in system_files.REFUSED:
                raise system_files.disk_error(folder, error) from None
            raise


def is_there(folder: Path, file: Remote, recorded: dict[str, Any], again: bool) -> bool:
    """Whether the folder has the file with the bytes that are listed.

    recorded: name -> entry of the receipt; again: read files in full, even with the same size and time.
    """
    path = folder / file.name
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return False
    if file.kind == SHA256:
        return hashing.of_file(path, again) == file.digest
    entry = recorded.get(file.name)
    if entry and entry["listed"] == f"{file.kind}:{file.digest}":
        return hashing.of_file(path, again) == entry["sha256"]
    return transfer.digest(path, file.kind) == file.digest


def may_replace(path: Path, entry: dict[str, Any] | None) -> bool:
    """Whether nothing of the user's is lost: no file is there, or the one that was fetched."""
    if not os.path.lexists(path):
        return True
    return entry is not None and path.is_file() and hashing.of_file(path) == entry["sha256"]


def check_room(folder: Path, missing: list[Remote]) -> None:
    """Raise UserError (exit 7) when what is still to come does not fit."""
    parts = [file.part(folder) for file in missing]
    have = sum(part.stat().st_size for part in parts if part.is_file())
    needed = sum(file.size or 0 for file in missing) - have
    free = shutil.disk_usage(folder).free
    if missing and free < needed + SPARE:
        problem = f"{folder}: {size_text(needed)} are still to come, {size_text(free)} are free."
        raise UserError(problem, "Make room, or choose another disk with --to.", DISK)


def give_names(folder: Path, fetched: list[Remote]) -> None:
    """Give the fetched files their names, and return when these are on the disk."""
    for file in fetched:
        file.part(folder).replace(folder / file.name)
    for parent in {(folder / file.name).parent for file in fetched}:
        system_files.sync_folder(parent)


def others(folder: Path, listing: Listing, recorded: dict[str, Any]) -> list[str]:
    """Files that were fetched before, are as they were, and are not listed: other --files, or gone."""
    names = {file.name for file in listing.files}
    return [
        name
        for name, entry in recorded.items()
        if name not in names and (folder / name).is_file() and may_replace(folder / name, entry)
    ]


def beginnings(folder: Path, listing: Listing) -> list[str]:
    """Our own leftovers: .part files of other contents."""
    return [
        path.relative_to(folder).as_posix()
        for file in listing.files
        for path in (folder / file.name).parent.glob(f"*{transfer.PART}")
        if re.fullmatch(re.escape(Path(file.name).name) + r"\.[0-9a-f]{12}", path.stem)
    ]


def receipt(folder: Path, listing: Listing) -> dict[str, Any]:
    """What the receipt says of these files, which are all there."""
    files = {}
    for file in listing.files:
        path = folder / file.name
        digest = file.digest if file.kind == SHA256 else hashing.of_file(path)
        files[file.name] = {
            "size": path.stat().st_size,
            "sha256": digest,
            "listed": f"{file.kind}:{file.digest}",
        }
    values = {key: getattr(listing, key) for key in manifest.TEXTS}
    return {**values, "files": files}


def size_text(size: int) -> str:
    """A number of bytes for people to read."""
    return tqdm.format_sizeof(size, "B", 1000)
