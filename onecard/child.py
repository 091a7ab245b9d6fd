"""Reading a stranger's file in a process of its own: one of our modules, run on it."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onecard.errors import UNSAFE, UserError


def convert(module: str, source: Path, output: Path, seconds: int, damaged: int, late: int) -> None:
    """Run `python -m module SOURCE OUTPUT`; raises UserError when it fails.

    Exit code 8 (unsafe) when the child says that the file asks for more than data, `damaged` when it cannot
    be read, `late` when it is not done within `seconds`.
    """
    command = [sys.executable, "-m", module, str(source.resolve()), str(output.resolve())]
    place = Path(__file__).resolve().parent.parent
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, cwd=place
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{source}: not read within {seconds} s.", "It was not loaded.", late) from None
    if ended.returncode:
        reason = (ended.stderr.strip().splitlines() or ["it needs too much memory or time"])[-1][:300]
        code = UNSAFE if ended.returncode == UNSAFE else damaged
        what = "would run code" if code == UNSAFE else "cannot be read"
        raise UserError(f"{source}: {what}: {reason}.", "It was not loaded.", code)


def lines(module: str, source: Path) -> Iterator[str]:
    """What `python -m module SOURCE` writes, line by line; raises ChildError at its end when it failed."""
    place = Path(__file__).resolve().parent.parent
    utf8 = {"encoding": "utf-8", "errors": "surrogatepass"}  # whatever the locale says
    with tempfile.TemporaryFile("w+", **utf8) as complaints:
        command = [sys.executable, "-m", module, str(source.resolve())]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, cwd=place, **utf8)
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


def limit(kind: int, value: int) -> None:
    """In a child: at most this much of a resource, or less where the user allows less."""
    import resource

    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


class ChildError(Exception):
    """Why a child could not read its file."""
