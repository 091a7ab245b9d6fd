"""Reading a stranger's file in a process of its own: one of our modules, run on it."""

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
from typing import Any

from onecard.errors import CHECKPOINT, DISK, MEMORY, UNSAFE, UserError, is_out_of_memory
from onecard.system.files import ROOT

UTF8 = {"encoding": "utf-8", "errors": "surrogatepass"}  # whatever the locale says
STALL = 900  # seconds without a word after which long work has come to a stop
NO_MEMORY = (
    "memoryerror",
    "cannot allocate memory",
    "out of memory",
    "failed to map segment",
    "bad_alloc",
    "start new thread",
)
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
SETTINGS = {**UTF8, "cwd": ROOT}


def environment(**more: str) -> dict[str, str]:
    """What a child that reads a stranger's file sees of this process's environment: no secrets."""
    return {**{name: os.environ[name] for name in ENVIRONMENT if name in os.environ}, **more}


def convert(module: str, source: Path, output: Path, seconds: int, damaged: int, late: int) -> None:
    """Run `python -m module SOURCE OUTPUT`; raises UserError when it fails.

    Exit code 8 (unsafe) when the child says that the file asks for more than data, `damaged` when it cannot
    be read, `late` when it is not done within `seconds`.
    """
    command = _command(module, source, output)
    try:
        settings = {**SETTINGS, "env": environment(), "check": False}
        ended = subprocess.run(command, capture_output=True, timeout=seconds, **settings)
    except subprocess.TimeoutExpired:
        raise UserError(f"{source}: not read within {seconds} s.", "It was not loaded.", late) from None
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["it needs too much memory or time"])[-1][:300]
        code = UNSAFE if ended.returncode == UNSAFE else damaged
        what = "would run code" if code == UNSAFE else "cannot be read"
        raise UserError(f"{source}: {what}: {reason}.", "It was not loaded.", code)


def lines(module: str, source: Path) -> Iterator[str]:
    """What `python -m module SOURCE` writes, line by line; raises ChildError at its end when it failed."""
    with tempfile.TemporaryFile("w+", **UTF8) as complaints:
        command = _command(module, source)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, **SETTINGS)
        try:
            yield from process.stdout
            code = process.wait()
        finally:
            process.kill()
            process.stdout.close()
            process.wait()
        if code:
            complaints.seek(0)
            said = complaints.read().strip().splitlines()
            raise ChildError(said[-1][:300] if said and code > 0 else "its reader crashed")


def work(module: str, request: dict[str, Any], told: Callable[[dict[str, Any]], None], keep: int) -> None:
    """Run `python -m module`, which must call `serve`, on a request; `told` gets every report it sends.

    keep: an open file (a lock) that stays the child's too. The child ends when this process does. Raises
    UserError: the child's own; exit 6 when it found no memory, 4 when it crashed or stands still.
    """
    with tempfile.TemporaryFile("w+", **UTF8) as complaints:
        process = subprocess.Popen(
            _command(module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            pass_fds=(keep,),
            cwd=SETTINGS["cwd"],
        )
        try:
            with contextlib.suppress(BrokenPipeError):  # it died; why is said below
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()  # and stays open: its end tells the child that this process is gone
            for line in _spoken(process.stdout.fileno()):
                report = json.loads(line)
                if "problem" in report:
                    raise UserError(report["problem"], report["fix"], report["code"])
                told(report)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if code:
            complaints.seek(0)
            said = complaints.read()
            last = (said.strip().splitlines() or ["it said nothing"])[-1][:300]
            if code == -signal.SIGKILL or any(phrase in said.lower() for phrase in NO_MEMORY):
                raise UserError(f"Out of memory: {last}.", "Give it more memory.", MEMORY)
            raise UserError(f"The process that reads the files ended with {code}: {last}.", "", CHECKPOINT)


def _spoken(handle: int) -> Iterator[bytes]:
    """Lines from a pipe; raises UserError (exit 4) when none comes for too long."""
    waiting = b""
    while True:
        if not select.select([handle], [], [], STALL)[0]:
            raise UserError(
                f"The process that reads the files has said nothing for {STALL} s.", "", CHECKPOINT
            )
        arrived = os.read(handle, 1 << 16)
        if not arrived:
            return
        *lines, waiting = (waiting + arrived).split(b"\n")
        yield from lines


def serve(do: Callable[[dict[str, Any], Callable[..., None]], None]) -> None:
    """In a child that `work` started: do(request, tell); tell(name=value, ...) reports to the parent."""
    voice = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints says it to the parent's log, not among the reports

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
        code = {errno.ENOMEM: MEMORY, errno.ENOSPC: DISK, errno.EDQUOT: DISK}.get(error.errno, CHECKPOINT)
        tell(problem=f"{error.strerror or error}: {error.filename or 'no file named'}.", fix="", code=code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        tell(problem="Out of memory.", fix="Give it more memory.", code=MEMORY)


def _end_with_parent() -> None:
    os.read(0, 1)  # nothing more is ever written: this is the parent's end; sys.stdin would need its lock
    os._exit(1)


def _command(module: str, *paths: Path) -> list[str]:
    return [sys.executable, "-m", module, *(str(path.resolve()) for path in paths)]


def limit(kind: int, value: int) -> None:
    """In a child: at most this much of a resource, or less where the user allows less."""
    import resource

    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


class ChildError(Exception):
    """Why a child could not read its file."""
