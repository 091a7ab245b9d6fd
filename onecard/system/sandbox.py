"""Reading a stranger's file in a process of its own: one of our modules, run on it.

Every such process is started here, without the user's environment: code that takes it over finds no tokens
there.
"""

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from onecard.errors import CHECKPOINT, DISK, MEMORY, UNSAFE, UserError, is_out_of_memory, last_line
from onecard.system import openmp
from onecard.system.files import ROOT, disk_error

UTF8, SURROGATES = "utf-8", "surrogatepass"  # whatever the locale says; rows may hold half of a character
STALL = 900  # seconds without a report after which the work counts as stopped
NO_MEMORY = (
    "memoryerror",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
    "bad_alloc",
    "start new thread",
)
ENVIRONMENT = (  # what a child gets of this process's environment, where it is set
    "PATH",  # libraries look for tools of the system while they are imported
    "HOME",  # and for the place of their caches
    "TMPDIR",
    "LD_LIBRARY_PATH",  # what torch and llama.cpp are linked with may lie there
    "LANG",  # how the names of files are encoded
    "LC_ALL",
    "LC_CTYPE",
    *openmp.USERS,  # how many threads the user allows, and how they wait
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",  # which GPUs the user allows: llama.cpp takes memory on each that it sees
    "CUDA_DEVICE_ORDER",  # how their numbers are meant
    "PYTHONPATH",  # where torch and pyarrow may lie; onecard is found in ROOT, where children run
    "PYTHONUSERBASE",
)
OFFLINE = {"HF_HUB_OFFLINE": "1"}  # a child that reads a file sends no requests to the hub


def environment(**more: str) -> dict[str, str]:
    """What a child that reads a stranger's file sees of this process's environment: no secrets."""
    return {**{name: os.environ[name] for name in ENVIRONMENT if name in os.environ}, **OFFLINE, **more}


def start(
    module: str,
    *arguments: object,
    stderr: int | IO[str],
    stdin: int = subprocess.DEVNULL,
    keep: tuple[int, ...] = (),
    errors: str = "replace",
    **variables: str,
) -> subprocess.Popen[str]:
    """Start `python -m module ARGUMENTS`, which reads a stranger's file; its output comes through a pipe.

    keep: open files that stay the child's too. errors: what to do with bytes that are not UTF-8. variables:
    what its environment needs beside the usual.
    """
    return subprocess.Popen(
        _command(module, *arguments),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        pass_fds=keep,
        cwd=ROOT,
        env=environment(**variables),
        encoding=UTF8,
        errors=errors,
    )


def start_server(module: str, stderr: IO[str], **variables: str) -> subprocess.Popen[bytes]:
    """Start `python -m module`, which reads a stranger's file and answers requests through pipes of bytes.

    It has a session of its own: a Ctrl-C in the terminal is meant for this process alone.
    """
    return subprocess.Popen(
        _command(module),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        cwd=ROOT,
        env=environment(**variables),
        start_new_session=True,
    )


def run(
    module: str, *arguments: object, seconds: float, **variables: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module ARGUMENTS`, which reads a stranger's file, to its end.

    Raises subprocess.TimeoutExpired when it is not done within `seconds`.
    """
    return subprocess.run(
        _command(module, *arguments),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds,
        check=False,
        cwd=ROOT,
        env=environment(**variables),
        encoding=UTF8,
        errors="replace",
    )


def convert(module: str, source: Path, output: Path, seconds: int, damaged: int, late: int) -> None:
    """Run `python -m module SOURCE OUTPUT`; raises UserError when it fails.

    Exit code 8 (unsafe) when the child says that the file asks for more than data, 7 when the disk is full,
    `damaged` when it cannot be read, `late` when it is not done within `seconds`.
    """
    try:
        ended = run(module, source.resolve(), output.resolve(), seconds=seconds)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{source}: the file was not read within {seconds} s.", "It was not loaded.", late
        ) from None
    if ended.returncode:
        reason = last_line(ended.stderr, "it needs too much memory or time")
        if ended.returncode == DISK:
            raise disk_error(output, OSError(reason))
        code = UNSAFE if ended.returncode == UNSAFE else damaged
        what = "the file would run code" if code == UNSAFE else "the file cannot be read"
        raise UserError(f"{source}: {what}: {reason}.", "It was not loaded.", code)


def lines(module: str, source: Path) -> Iterator[str]:
    """What `python -m module SOURCE` writes, line by line; raises ChildError at its end when it failed."""
    with tempfile.TemporaryFile("w+", encoding=UTF8, errors="replace") as complaints:
        process = start(module, source.resolve(), stderr=complaints, errors=SURROGATES)
        assert process.stdout
        try:
            yield from process.stdout
            code = process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if code:
            complaints.seek(0)
            crashed = "its reader crashed"
            raise ChildError(last_line(complaints.read(), crashed) if code > 0 else crashed)


def work(
    module: str, request: dict[str, Any], on_report: Callable[[dict[str, Any]], None], keep: int
) -> None:
    """Run `python -m module`, which must call `serve`, on a request; on_report gets every report it sends.

    keep: an open file (a lock) that stays the child's too. The child ends when this process does. Raises
    UserError: the child's own; exit 6 when memory ran out, 4 when it crashed or stopped working.
    """
    with tempfile.TemporaryFile("w+", encoding=UTF8, errors="replace") as complaints:
        process = start(module, stdin=subprocess.PIPE, stderr=complaints, keep=(keep,))
        assert process.stdin
        assert process.stdout
        try:
            with contextlib.suppress(BrokenPipeError):  # it has died; the reason is raised below
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()  # the child ends when this pipe is closed
            for line in _lines_of(process.stdout.fileno()):
                report = json.loads(line)
                if "problem" in report:
                    raise UserError(report["problem"], report["fix"], report["code"])
                on_report(report)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if code:
            complaints.seek(0)
            text = complaints.read()
            last = last_line(text, "it gave no reason")
            if code == -signal.SIGKILL or any(phrase in text.lower() for phrase in NO_MEMORY):
                raise UserError(f"Out of memory: {last}.", "Give it more memory.", MEMORY)
            raise UserError(f"The process that reads the files ended with {code}: {last}.", "", CHECKPOINT)


def _lines_of(handle: int) -> Iterator[bytes]:
    """Lines from a pipe; raises UserError (exit 4) when none comes for too long."""
    incomplete = b""
    while True:
        if not select.select([handle], [], [], STALL)[0]:
            raise UserError(
                f"The process that reads the files has reported nothing for {STALL} seconds.", "", CHECKPOINT
            )
        arrived = os.read(handle, 1 << 16)
        if not arrived:
            return
        *lines, incomplete = (incomplete + arrived).split(b"\n")
        yield from lines


def serve(do: Callable[[dict[str, Any], Callable[..., None]], None]) -> None:
    """In a child that `work` started: do(request, tell); tell(name=value, ...) reports to the parent."""
    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints goes to the parent's log, not among the reports

    def tell(**report: Any) -> None:
        voice.write(json.dumps(report) + "\n")
        voice.flush()

    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        do(request, tell)
    except UserError as error:
        tell(problem=error.problem, fix=error.fix, code=error.code)
    except OSError as error:
        codes = {errno.ENOMEM: MEMORY, errno.ENOSPC: DISK, errno.EDQUOT: DISK}
        code = codes.get(error.errno or 0, CHECKPOINT)  # no number: raised by hand
        tell(problem=f"{error.strerror or error}: {error.filename or 'no file named'}.", fix="", code=code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell(problem="Out of memory.", fix="Give it more memory.", code=MEMORY)


def _end_with_parent() -> None:
    os.read(
        0, 1
    )  # returns when the parent has died, since it writes nothing more; sys.stdin would take a lock
    os._exit(1)


def _command(module: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", module, *map(str, arguments)]


def limit(kind: int, value: int) -> None:
    """In a child: at most this much of a resource, or less where the user allows less."""
    import resource

    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


class ChildError(Exception):
    """Why a child could not read its file."""
