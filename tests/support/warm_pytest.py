"""pytest in forked children of a process that has imported the libraries, for tests/mutation.py.

`survey` runs tests once and records what each costs and which lines of a file it runs; `run_pytest` runs
chosen ones. A child imports the sources of the project as they are at its start.
"""

import contextlib
import inspect
import mmap
import os
import re
import resource
import select
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SLOW = re.compile(r"subprocess\.|torchrun\(|serving\(")  # in the source of a test that starts a program
SLOW_FIXTURES = {"browser", "server"}
MEMORY = 12 << 30  # bytes that a child may allocate, because a mutant may never stop
WAITING = 15
LINES = 1000  # more than any file has
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", "--basetemp=tmp"]
OPTIONS += ["--assert=plain"]  # what pytest rewrites is compiled anew each time
Tests = dict[str, tuple[float, list[int]]]  # name of a test -> its seconds, and lines that it runs


def in_child(tree: Path, seconds: float, work: Callable[[], int]) -> tuple[int | None, str]:
    """Do work in a child in a copy of the tree; returns exit code, None if it took too long, and output.

    seconds: of one core, for each process, so that a busy machine does not matter; a process that waits for
    something may take WAITING times as long.
    """
    output = tree / "output.txt"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(tree)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(seconds + used.ru_utime + used.ru_stime)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            descriptor = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "onecard")]:
                del sys.modules[name]
            sys.path.insert(0, str(tree))
            fork_the_harness()
            code = work()
        finally:
            sys.stdout.flush()
            os._exit(code)
    with open(os.pidfd_open(pid), "rb", 0) as descriptor:  # it becomes readable when the child ends
        ended = select.select([descriptor], [], [], WAITING * seconds)[0]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # with what its tests left behind
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    is_late = not ended or code in (-signal.SIGKILL, -signal.SIGXCPU)
    return (None if is_late else code), output.read_text(errors="replace") if output.exists() else ""


def fork_the_harness() -> None:
    """Let the servers of tests/support/harness.py be forks of this process: they need not import torch."""
    from tests.support import harness

    class Server:
        def __init__(self, *_: Any, **__: Any):
            (read, self_write), (self_read, write) = os.pipe(), os.pipe()
            self.pid = os.fork()
            if self.pid == 0:
                os.dup2(read, 0)
                os.dup2(write, 1)
                os.closerange(3, 256)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                try:
                    harness.serve()
                finally:
                    os._exit(0)
            os.close(read)
            os.close(write)
            self.stdin, self.stdout = os.fdopen(self_write, "w"), os.fdopen(self_read)

        def wait(self, timeout: float) -> None:
            os.waitpid(self.pid, 0)

    harness.subprocess = types.SimpleNamespace(Popen=Server, PIPE=None)


def run_pytest(files: list[str], plugin: Any, *options: str) -> int:
    """The exit code of pytest for these files of tests/."""
    return int(pytest.main([*OPTIONS, *options, *(f"tests/{name}" for name in files)], [plugin]))


class Chosen:
    """A pytest plugin: only these tests, in this order."""

    def __init__(self, names: list[str]):
        self.turn = {name: number for number, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.nodeid in self.turn]

    def pytest_collection_finish(self, session: Any) -> None:
        session.items.sort(key=lambda item: self.turn[item.nodeid])


def survey(source: Path, files: list[str]) -> Tests:
    """The tests of these files of tests/ that pass, with the lines of `source` that each runs."""
    marks = mmap.mmap(-1, LINES)  # shared with the children that tests fork

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != str(source):
            return None
        if frame.f_lineno is not None:  # not every instruction has a line; an error here would end the trace
            marks[frame.f_lineno] = 1
        return trace

    recorder = Recorder(marks, trace)
    run_pytest(files, recorder)
    sys.settrace(None)
    return recorder.result()


class Recorder:
    """A pytest plugin: leaves out tests that start programs; records seconds and lines of the others."""

    def __init__(self, marks: mmap.mmap, trace: Callable[..., Any]):
        self.marks, self.trace = marks, trace
        self.passed: set[str] = set()  # names of tests
        self.lines: set[int] = set()  # that ran since the last report, outside of fixtures
        self.fixtures: dict[str, set[int]] = {}  # of each fixture; they count for all tests that use it
        self.tests: dict[str, tuple[float, set[int], list[str]]] = {}  # seconds, lines, names of fixtures

    def taken(self) -> set[int]:
        """The lines that ran since the last call."""
        lines = {line for line in range(LINES) if self.marks[line]}
        self.marks[:] = bytes(LINES)
        return lines

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [
            item
            for item in items
            if not SLOW_FIXTURES.intersection(item.fixturenames)
            and not SLOW.search(inspect.getsource(item.function))
        ]
        self.tests = {item.nodeid: (0.0, set(), item.fixturenames) for item in items}
        self.taken()

    def pytest_runtest_logstart(self) -> None:
        sys.settrace(self.trace)  # again before each test, because one may have ended it

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        self.lines |= self.taken()
        try:
            return (yield)
        finally:
            self.fixtures.setdefault(fixturedef.argname, set()).update(self.taken())

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)
        seconds, lines, fixtures = self.tests[report.nodeid]
        self.tests[report.nodeid] = (seconds + report.duration, lines | self.lines | self.taken(), fixtures)
        self.lines = set()

    def result(self) -> Tests:
        return {
            name: (seconds, sorted(lines.union(*(self.fixtures.get(each, set()) for each in fixtures))))
            for name, (seconds, lines, fixtures) in self.tests.items()
            if name in self.passed
        }
