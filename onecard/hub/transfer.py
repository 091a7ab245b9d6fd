"""Downloads one file of a server; its checksum proves that the bytes are the same.

A cut transfer is continued, a failing one tried again with growing waits, and bytes with another checksum
never count as done. They are gathered in a .part file beside the target, named after the checksum, so that a
file that was changed on the server is not continued with the old one's beginning. This file knows no hub.
"""

import contextlib
import dataclasses
import email.utils
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2
import tenacity
from tqdm import tqdm

from onecard.errors import CHECKPOINT, UNSAFE, UserError, first_line
from onecard.hub import addresses
from onecard.system import files as system_files

CONNECT, SILENCE = 10.0, 30.0  # seconds until a connection, and between two pieces of a file, at most
TRIES = 8  # in a row that bring next to nothing
PROGRESS = 1 << 20  # bytes that make the tries count from the start again
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds
LONGEST_REQUESTED = 300.0  # seconds that a server may ask for (Retry-After)
PART = ".part"
SHA256, MD5, GIT = "sha256", "md5", "git"  # git: SHA-1 of a blob, header included
DEVICES = {"con", "prn", "aux", "nul", *(f"{name}{n}" for name in ("com", "lpt") for n in range(10))}
LONGEST_NAME = 500  # characters
LONGEST_LIST = 1 << 26  # bytes
Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file that a server offers, as its owner describes it."""

    name: str  # path inside the folder
    url: str
    size: int | None  # bytes; None: the server will say
    kind: str  # of the checksum: SHA256, MD5 or GIT
    digest: str  # hexadecimal

    def part(self, folder: Path) -> Path:
        target = folder / self.name
        return target.with_name(f"{target.name}.{self.digest[:12]}{PART}")


class UnreachableError(UserError):
    """The server cannot be reached at all; nothing was tried again."""


class TransientError(Exception):
    """A failure that may pass; wait: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class WrongBytesError(Exception):
    """What the server sends is not the file that was listed."""


def connect(hosts: addresses.Hosts) -> httpx2.Client:
    """A client that follows redirects; httpx2 sends Authorization and cookies to the first host alone."""
    return httpx2.Client(
        transport=addresses.Checked(hosts),
        follow_redirects=True,
        max_redirects=10,
        timeout=httpx2.Timeout(SILENCE, connect=CONNECT),
    )


def bare(url: str) -> str:
    """An address as it may be shown: without its query, which may be a signature, and its password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def check_name(name: Any, source: str) -> str:
    """The name, when it stays inside a folder on every system; raises UserError (exit 8) otherwise."""
    parts = name.split("/") if isinstance(name, str) else [""]
    plain = isinstance(name, str) and name.isprintable() and "\\" not in name and len(name) <= LONGEST_NAME
    if (
        not plain
        or re.match(r"[A-Za-z]:", name)
        or any(part in ("", ".", "..") or part.split(".")[0].lower() in DEVICES for part in parts)
        or any(part.rstrip(". ") != part or len(part.encode()) > 200 for part in parts)
    ):
        problem = f"{source} offers a file called {str(name)[:80]!r}, which could land outside the folder."
        raise UserError(problem, "Nothing was written. Do not use this source.", UNSAFE)
    return name


def check_place(folder: Path, name: str) -> None:
    """Raise UserError (exit 8) when links inside `folder` lead a name out of it."""
    path = folder
    for part in name.split("/")[:-1]:
        path /= part
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            problem = f"{path}: a link or a file, where {name} needs a folder."
            raise UserError(problem, "Remove it, or choose another --to.", UNSAFE)


def fetch(client: httpx2.Client, file: Remote, folder: Path, headers: Mapping[str, str], total: Any) -> Path:
    """Bring a file's .part to its whole, verified content and return its path; `total` is a bar of bytes.

    Wrong bytes are fetched once more from the start. Raises UserError: exit 2 when the server fails or
    refuses, 4 when it goes on sending another file than was listed.
    """
    part = file.part(folder)
    system_files.make_folder(part.parent)
    if part.is_symlink():
        part.unlink()
    for _ in range(2):
        try:
            whole = (
                file
                if file.size is not None
                else dataclasses.replace(file, size=ask_size(client, file, headers))
            )
            _fill(client, whole, part, headers, total)
            if digest(part, file.kind) == file.digest:
                return part
            reason = f"its {file.kind} checksum is not the one that was listed"
        except WrongBytesError as error:
            reason = str(error)
        total.update(-part.stat().st_size if part.exists() else 0)
        part.unlink(missing_ok=True)
        _say(f"{file.name}: {reason}; removed")
    problem = f"{file.name}: {reason}, in two attempts. The file was removed."
    raise UserError(problem, "Try later, or use another source: the server's file is damaged.", CHECKPOINT)


def ask_size(client: httpx2.Client, file: Remote, headers: Mapping[str, str]) -> int:
    """Bytes of a file whose list does not say; asked with a GET: signed addresses often allow only that."""

    def ask() -> int:
        with _get(client, file.url, {**headers, "Range": "bytes=0-0"}, file.name) as response:
            text = response.headers.get("Content-Range", "").rpartition("/")[2]
            text = response.headers.get("Content-Length", "") if response.status_code == 200 else text
            if not text.isdecimal():
                raise UserError(
                    f"{file.name}: the server does not give the size of the file.", "Use another source."
                )
            return int(text)

    return patient(ask)


def get(client: httpx2.Client, url: str, headers: Mapping[str, str], what: str) -> bytes:
    """A short answer; raises UserError, UnreachableError when there is no connection."""

    def ask() -> bytes:
        content = b""
        with _get(client, url, headers, what, patient_connection=False) as response:
            for piece in response.iter_bytes():
                content += piece
                if len(content) > LONGEST_LIST:
                    raise UserError(f"{what}: the server's answer is too long.", "Use another source.")
        return content

    return patient(ask)


def patient(work: Callable[[], Value], arrived: Callable[[], int] = lambda: 0) -> Value:
    """What `work` returns, tried again after TransientError; raises UserError when that does not help.

    arrived: bytes so far; with PROGRESS more of them the tries count from the start again.
    """
    mark, first = arrived(), 1

    def tries(state: tenacity.RetryCallState) -> int:
        nonlocal mark, first
        if arrived() - mark >= PROGRESS:
            mark, first = arrived(), state.attempt_number
        return state.attempt_number - first + 1

    def wait(state: tenacity.RetryCallState) -> float:
        requested = state.outcome.exception().wait
        return requested if requested is not None else min(LONGEST_WAIT, FIRST_WAIT * 2 ** (tries(state) - 1))

    def enough(state: tenacity.RetryCallState) -> bool:
        requested = state.outcome.exception().wait
        return tries(state) >= TRIES or (requested is not None and requested > LONGEST_REQUESTED)

    def tell(state: tenacity.RetryCallState) -> None:
        _say(f"{state.outcome.exception()}; again in {state.next_action.sleep:.0f} s")

    again = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(TransientError),
        stop=enough,
        wait=wait,
        before_sleep=tell,
        reraise=True,
    )
    try:
        return again(work)
    except TransientError as error:
        later = f" The server asks to wait {error.wait:.0f} s." if error.wait is not None else ""
        fix = "What has arrived is kept; run the same command again to continue."
        raise UserError(f"{error}.{later}", fix) from None


def digest(path: Path, kind: str) -> str:
    """Checksum of a file, hexadecimal; kind: SHA256, MD5 or GIT."""
    return digests(path, {kind})[kind]


def digests(path: Path, kinds: set[str]) -> dict[str, str]:
    """Several checksums of a file in one reading."""
    hashes = {kind: hashlib.new("sha1" if kind == GIT else kind, usedforsecurity=False) for kind in kinds}
    if GIT in hashes:
        hashes[GIT].update(f"blob {path.stat().st_size}\0".encode())
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            for each in hashes.values():
                each.update(chunk)
    return {kind: each.hexdigest() for kind, each in hashes.items()}


def _fill(client: httpx2.Client, file: Remote, part: Path, headers: Mapping[str, str], total: Any) -> None:
    """Append to the .part until it has the file's size."""
    tag = ""  # the server's own mark of the content, from its last answer

    def have() -> int:
        return part.stat().st_size if part.exists() else 0

    def begin_again() -> None:
        total.update(-have())
        part.unlink(missing_ok=True)

    def more() -> None:
        nonlocal tag
        if have() > file.size:
            begin_again()
        if have() == file.size and have():
            return
        ask = {**headers, **({"Range": f"bytes={have()}-"} if have() else {})}
        if have() and tag:
            ask["If-Range"] = tag
        with _get(client, file.url, ask, file.name) as response:
            named = response.headers.get("ETag", "")
            tag = "" if named.startswith("W/") else named
            if response.status_code != 206 or not _continues(response, have(), file.size):
                begin_again()
                if response.status_code != 200:
                    raise TransientError(f"{file.name}: the server does not continue it where it was cut")
            length = response.headers.get("Content-Length", "")
            if length.isdecimal() and have() + int(length) != file.size:
                raise WrongBytesError(f"the server has {have() + int(length)} bytes, {file.size} were listed")
            _receive(response, file, part, total, bar)
        if have() < file.size:
            raise TransientError(f"{file.name}: the connection ended early")

    total.update(have())
    with tqdm(
        total=file.size, initial=have(), desc=file.name, unit="B", unit_scale=True, leave=False, disable=None
    ) as bar:
        patient(more, have)
        if not part.exists():  # an empty file
            part.touch()


def _continues(response: httpx2.Response, have: int, size: int) -> bool:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return bool(match) and (int(match[1]), int(match[2])) == (have, size)


def _receive(response: httpx2.Response, file: Remote, part: Path, total: Any, bar: Any) -> None:
    have = part.stat().st_size if part.exists() else 0
    handle = os.open(part, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(handle, "ab") as target:
        bar.n = have
        for piece in response.iter_raw():  # as it comes: what has arrived when the line is cut stays
            have += len(piece)
            if have > file.size:
                raise WrongBytesError(f"the server sends more than the {file.size} bytes that were listed")
            target.write(piece)
            bar.update(len(piece))
            total.update(len(piece))


@contextlib.contextmanager
def _get(
    client: httpx2.Client, url: str, headers: Mapping[str, str], what: str, patient_connection: bool = True
) -> Any:
    """A streamed answer with a good status; raises TransientError, UserError or UnreachableError."""
    try:
        with client.stream("GET", url, headers={"Accept-Encoding": "identity", **headers}) as response:
            check_status(response.status_code, response.headers, what, str(response.url))
            yield response
    except httpx2.ConnectError as error:
        if not patient_connection:
            host = urlsplit(url).hostname
            raise UnreachableError(
                f"{what}: {host} cannot be reached ({first_line(error)}).", "Check the network."
            ) from None
        raise TransientError(f"{what}: {first_line(error)}") from None
    except httpx2.TransportError as error:
        raise TransientError(f"{what}: {first_line(error)}") from None
    except (httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
        raise UserError(f"{what}: {first_line(error)}.", "Check the address.") from None


def check_status(status: int, headers: Mapping[str, str], what: str, url: str) -> None:
    """Raise TransientError for an answer that may change, UserError for one that will not."""
    if status in (408, 425, 429) or status >= 500:
        raise TransientError(f"{what}: the server answers {status}", _seconds_of(headers.get("Retry-After")))
    if status in (401, 403):
        problem = f"{what}: {urlsplit(url).hostname} refuses it ({status})."
        raise UserError(problem, "It may need a token (HF_TOKEN), its licence accepted, or a fresh address.")
    if status >= 400 and status != 416:
        raise UserError(f"{what}: {bare(url)} answers {status}.", "Check the name and the revision.")


def _seconds_of(text: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110: a number, or a date)."""
    if text is None:
        return None
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # above the bars
