"""Reading a stranger's file in a process of its own: one of our modules, run on it."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onecard.errors import UNSAFE, UserError

UTF8 = {"encoding": "utf-8", "errors": "surrogatepass"}  # whatever the locale says
SETTINGS = {**UTF8, "cwd": Path(__file__).resolve().parent.parent}


def convert(module: str, source: Path, output: Path, seconds: int, damaged: int, late: int) -> None:
    """Run `python -m module SOURCE OUTPUT`; raises UserError when it fails.

    Exit code 8 (unsafe) when the child says that the file asks for more than data, `damaged` when it cannot
    be read, `late` when it is not done within `seconds`.
    """
    command = _command(module, source, output)
    try:
        ended = subprocess.run(command, capture_output=True, timeout=seconds, check=False, **SETTINGS)
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
