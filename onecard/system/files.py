"""Where our files lie, and how they are written: small ones whole or not at all, syncs, disk room.

Small files are written beside their place, synced and renamed.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, DISK, UserError

PACKAGE = Path(__file__).resolve().parents[1]  # onecard/
ROOT = PACKAGE.parent  # of a checkout, or the folder of all packages
SAMPLE = "sample"  # folder of rows: in onecard/ where it was installed as a package, beside it in a checkout
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of a disk that takes no more
PROBE = ".onecard-"  # of what only shows whether there can be something


def cache_folder() -> Path:
    """The folder in which OneCard keeps what it has fetched and computed; it may not exist yet.

    The variable ONECARD_CACHE names it. Otherwise it is the user's cache folder of this system: on Linux
    $XDG_CACHE_HOME/onecard or ~/.cache/onecard. Older versions used these two on every system, so a cache
    that is there already is still used.
    """
    named = os.environ.get("ONECARD_CACHE")
    if named:
        return Path(named)
    import platformdirs  # imported late, because --help works without any other package

    folder = platformdirs.user_cache_path("onecard", appauthor=False)
    older = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onecard"
    return older if older.is_dir() and not folder.is_dir() else folder


def data_folder() -> Path:
    """The folder in which the service keeps keys and files; it may not exist yet.

    It is in the user's data folder of this system: on Linux $XDG_DATA_HOME/onecard or ~/.local/share/onecard.
    """
    import platformdirs  # imported late, as above

    return platformdirs.user_data_path("onecard", appauthor=False) / "serve"


def or_sample(path: Path) -> Path:
    """The path; where there is no such file and it is called sample/NAME, the one that OneCard brings."""
    if path.exists() or path.parts[:1] != (SAMPLE,) or ".." in path.parts:
        return path
    is_checkout = (ROOT / "tools" / "setup.sh").is_file()  # elsewhere ROOT holds others' packages
    brought = (folder / path for folder in (PACKAGE, *([ROOT] if is_checkout else [])))
    return next((file for file in brought if file.is_file()), path)


def read_json(path: Path, fix: str = "") -> dict[str, Any] | None:
    """Content of a JSON file, None when there is none; raises UserError (exit 4) when it is damaged.

    fix: what the user of the caller's program can do then.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}.", fix, CHECKPOINT) from None


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file so that it is whole or not there."""
    replace(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or as it was; an OSError names it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # of a write, which does not say where
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file, and return when it is on the disk; the file is created when it is missing.

    Raises OSError, and then the file is as it was, or empty.
    """
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        try:
            view = memoryview(content)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
    if is_new:
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and those above it that are missing; a power failure takes none of them away."""
    path = path.absolute()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_folder(folder.parent)


def follow_umask(folder: Path) -> None:
    """Give a new folder and all in it the rights of what a plain `open` creates: those that the umask says.

    safetensors and tempfile create files and folders that only their owner may read.
    """
    probe = folder / f"{PROBE}rights"
    handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        rights = os.fstat(handle).st_mode & 0o777
    finally:
        os.close(handle)
        probe.unlink()
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            new = rights | (rights & 0o444) >> 2 if path.is_dir() else rights
            if mode & 0o777 != new:  # some file systems have the same rights for all files, and refuse others
                path.chmod(mode & 0o7000 | new)


def put_file(temporary: Path, path: Path) -> None:
    """Sync a file that is written, and rename it to `path`, on the same file system: whole, or as it was."""
    sync_file(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or as it was; raises UserError (exit 7) on a full disk."""
    temporary = path.with_name(f".{path.name}.tmp.png")
    try:
        figure.savefig(temporary, dpi=120)
        put_file(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise UserError (exit 7) when `folder` cannot be written or less than needed_bytes are free."""
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        tempfile.TemporaryFile(prefix=PROBE, dir=parent).close()  # without a name: a kill leaves nothing
    except OSError as error:
        raise UserError(
            f"--output_path {folder}: cannot write in {parent}: {error.strerror}.", "Choose another.", DISK
        ) from None
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UserError(
            f"--output_path {folder}: the run needs about {needed_bytes >> 20} MiB, free: {free >> 20} MiB.",
            "Make room or choose another disk.",
            DISK,
        )


def disk_error(path: Path, error: Exception) -> UserError:
    """What to say when writing failed; safetensors has an error of its own for a full disk."""
    problem = f"{path}: could not be written: {getattr(error, 'strerror', None) or error}."
    return UserError(problem, "Make room or check the rights; what was saved before is whole.", DISK)


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Raise OSError when a library written in Rust (safetensors, tokenizers) says that the disk is full."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match and int(match[1]) in REFUSED:
            raise OSError(int(match[1]), os.strerror(int(match[1]))) from error
        raise


def sync_file(path: Path) -> None:
    """Return when the content of a file is on the disk, where a power failure leaves it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """The same of the names in a folder: what was created, renamed or deleted there stays so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
