"""Faults at the system calls of a child process, which strace plants from outside of Python."""

import os
import signal
import subprocess
from collections.abc import Callable


def traced(work: Callable[[], object], inject: str) -> int:
    """The exit code of work() in a forked child, while strace interferes with its system calls."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(reader, 1)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(reader)
    command = ["strace", "-f", "-p", str(pid), "-e", f"inject={inject}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        first = tracer.stderr.readline()
        assert "attached" in first or os.kill(pid, signal.SIGKILL), first
        os.write(writer, b"x")
        os.close(writer)
        tracer.stderr.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
