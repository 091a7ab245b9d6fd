"""The manifest of a downloaded folder, onecard_download.json: what the folder holds and where it came from.

It is written last. It names the commit, so that the folder says which version of a model it holds, and the
size and SHA-256 of each file.
"""

import datetime
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError
from onecard.hub import transfer
from onecard.system import files as system_files
from onecard.system import hashing

NAME = "onecard_download.json"
TEXTS = ("source", "name", "revision", "commit", "endpoint")


def place(name: str) -> Path:
    """The folder for a model that is fetched by its name alone."""
    return system_files.cache_folder() / "models" / name.replace("/", "--")


def downloaded(name: str) -> Path | None:
    """The folder of a model that was fetched by its name; None when it was not fetched."""
    if name.count("/") != 1 or name.startswith(".") or Path(name).exists():
        return None
    folder = place(name)
    return folder if (folder / NAME).is_file() else None


ANEW = "Delete it and run the same line again."


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, None without one; raises UserError (exit 4) when it is damaged."""
    path = folder / NAME
    values = system_files.read_json(path, ANEW) if path.is_file() else None
    if values is None:
        return None
    files = values.get("files") if isinstance(values, dict) else None
    whole = isinstance(files, dict) and all(isinstance(values.get(key), str) for key in TEXTS)
    if not whole or not all(_is_entry(entry) for entry in files.values()):
        raise UserError(f"{path}: damaged.", ANEW, CHECKPOINT)
    for name in files:
        transfer.check_name(name, str(path))
    return values


def write(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest of a folder, with the time of now.

    values: TEXTS, and `files`: name -> size in bytes, sha256, and the checksum that the server listed.
    """
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    system_files.write_json(folder / NAME, {**values, "fetched": stamp})


def differing(folder: Path, values: dict[str, Any], again: bool = False) -> list[str]:
    """The files that are missing or differ from what was fetched.

    again: read each file, also when its hash is in the user's cache.
    """
    present = {name: folder / name for name in values["files"] if (folder / name).is_file()}
    digests = hashing.of_files(list(present.values()), again)
    return [
        name
        for name, entry in values["files"].items()
        if name not in present or digests[present[name]] != entry["sha256"]
    ]


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("size"), int)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("listed"), str)
    )
