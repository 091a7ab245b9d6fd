"""Trainings in forked children of a process that imported torch once and never started a thread pool.

A child starts in one second instead of ten, can be killed at any moment, and cannot disturb the process of
the tests. `Harness` is the client and `python -m tests.support.harness` the server; a request is one line of
JSON, and so is an answer. Each child runs on one thread, and is killed after LIMIT seconds.
"""

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support.paths import ROOT

LIMIT = 300  # seconds of a child, which may wait for another process for ever


class Harness:
    """Two servers, one for each core; map() distributes requests over them."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "tests.support.harness"]
        self.servers = [
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        self.free = list(self.servers)

    def run(self, program: str, flags: dict[str, Any], **fault: Any) -> dict[str, Any]:
        """Run finetune or finetune_continue with options.

        Returns its exit code (negative for a signal), the seconds it took, and what it said.
        """
        arguments = [f"--{name}={value}" for name, value in flags.items()]
        return self.ask({"program": program, "argv": arguments, "fault": fault})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        server = self.free.pop()
        try:
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())
        finally:
            self.free.append(server)

    def map(self, cell: Any, items: Any) -> list[Any]:
        """The results of cell(item) for all items, two at a time; raises the first exception."""
        with ThreadPoolExecutor(len(self.servers)) as pool:
            return list(pool.map(cell, items))

    def close(self) -> None:
        for server in self.servers:
            server.stdin.close()
            server.wait(timeout=30)


def serve() -> None:
    """Import everything once, then fork a child for each request."""
    import torch
    import transformers  # noqa: F401

    from onecard.training import loop  # noqa: F401

    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(json.dumps(attend(json.loads(line))) + "\n")


def attend(request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        child(request)
    os.close(writer)
    fault = request["fault"]
    for delay, number in fault.get("signals", []):
        time.sleep(max(0, started + delay - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, getattr(signal, number))
    limit = request.get("limit", LIMIT)
    output, is_late = read(reader, started + limit)
    if is_late:
        os.kill(pid, signal.SIGKILL)
        output += f"\nkilled after {limit} s"
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started, "said": output}


def read(reader: int, until: float) -> tuple[str, bool]:
    """(What arrives in a pipe, whether it was still open at this time of time.monotonic())."""
    content, is_open = b"", True
    while is_open and select.select([reader], [], [], max(0, until - time.monotonic()))[0]:
        chunk = os.read(reader, 1 << 16)
        content, is_open = content + chunk, bool(chunk)
    return io.TextIOWrapper(io.BytesIO(content), "utf-8", "replace").read(), is_open


def child(request: dict[str, Any]) -> None:
    """Plant the fault, run the program, and exit with its exit code."""
    from onecard import errors
    from tests.support import faults

    code = 99
    try:
        with faults.planted(request["fault"]):
            code = 0
            errors.run_program(lambda: program(request["program"], request["argv"]))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush()
        os._exit(code)


def program(name: str, argv: list[str]) -> None:
    """Do what finetune.py and finetune_continue.py do, without downloads, sample answers and plots."""
    from onecard.config import options as config_options
    from onecard.config import training as config_training
    from onecard.training import loop

    if name == "finetune":
        options, explicit = config_options.parse_given(config_training.FinetuneConfig, argv)
        loop.run(options, explicit=explicit, sample=lambda *_: [], draw=lambda *_: None)
    else:
        options, explicit = config_options.parse_given(config_training.ContinueConfig, argv)
        loop.go_on(options, explicit, sample=lambda *_: [], draw=lambda *_: None)


@contextlib.contextmanager
def started() -> Iterator[Harness]:
    harness = Harness()
    try:
        yield harness
    finally:
        harness.close()


if __name__ == "__main__":
    serve()
