"""SHA-256 of files, kept in the user's cache, so that a file is read again only when it has changed.

The hash is kept with the file's size, times and inode. The file is read again when one of these differs, or
when the caller asks for it. No program can set the change time back.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.system import files as system_files

CACHE = "fingerprints.json"
CHUNK = 1 << 22  # bytes
LARGE = 100 * CHUNK


def of_files(paths: list[Path], again: bool = False) -> dict[Path, str]:
    """SHA-256 of each file. again: read each file, also when its hash is in the cache."""
    cached = _read_cache()
    entries: dict[str, list[Any]] = {}
    for name in dict.fromkeys(str(path.resolve()) for path in paths):
        entry, now = cached.get(name), stamp(Path(name))
        entries[name] = [now, sha256(Path(name))] if again or entry is None or entry[0] != now else entry
    if any(cached.get(name) != entry for name, entry in entries.items()):
        _write_cache({**cached, **entries})
    return {path: entries[str(path.resolve())][1] for path in paths}


def of_file(path: Path, again: bool = False) -> str:
    """SHA-256 of one file."""
    return of_files([path], again)[path]


def of_folder(paths: list[Path], again: bool = False) -> str:
    """One SHA-256 of several files' names and contents."""
    parts = of_files(sorted(paths), again)
    text = "".join(f"{path.name} {digest}\n" for path, digest in parts.items())
    return hashlib.sha256(text.encode()).hexdigest()


def stamp(path: Path) -> list[int]:
    """Size, times and inode of a file, one of which changes with its content."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def sha256(path: Path) -> str:
    """SHA-256 of a file, with a progress bar when it is large."""
    digest, size = hashlib.sha256(), path.stat().st_size
    hide = True if size < LARGE else None
    with (
        open(path, "rb") as file,
        tqdm(total=size, desc=f"hashing {path.name}", unit="B", unit_scale=True, disable=hide) as bar,
    ):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def _read_cache() -> dict[str, list[Any]]:
    """Path -> [stamp, SHA-256]."""
    try:
        entries = json.loads((system_files.cache_folder() / CACHE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write_cache(entries: dict[str, list[Any]]) -> None:
    """Write the cache if that is possible; without it every run reads its files again."""
    entries = {path: entry for path, entry in entries.items() if Path(path).exists()}
    with contextlib.suppress(OSError):
        system_files.cache_folder().mkdir(parents=True, exist_ok=True)
        temporary = system_files.cache_folder() / f".{CACHE}-{os.getpid()}"
        try:
            temporary.write_text(json.dumps(entries), encoding="utf-8")
            temporary.replace(system_files.cache_folder() / CACHE)
        finally:
            temporary.unlink(missing_ok=True)
