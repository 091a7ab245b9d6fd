"""A program in a pseudo-terminal, in a forked child: a test types its keys and reads what it shows."""

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

import torch

READY = r"\x1b\[\?2004h.*?>.*?\x1b\[\?25h"  # bracketed paste is on, then the prompt, then the cursor


class Pty:
    """A forked child in a pseudo-terminal: a test types its keys and reads what it shows."""

    def __init__(self, run: Callable[[], None], environment: dict[str, str]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not use
            self.pid, self.fd = pty.fork()
        if self.pid == 0:
            self._child(run, environment)
        self.text, self.place = "", 0

    def _child(self, run: Callable[[], None], environment: dict[str, str]) -> None:
        code = 99
        try:
            os.environ.update({"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "80", **environment})
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def keys(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def line(self, text: str) -> None:
        self.keys(f"{text}\r")

    def see(self, pattern: str, seconds: float = 20) -> re.Match:
        """Wait until the pattern appears after what was seen before."""
        end = time.monotonic() + seconds
        while not (match := re.compile(pattern, re.S).search(self.text, self.place)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; there is {self.text[self.place :]!r}"
            with contextlib.suppress(OSError):
                if data := os.read(self.fd, 65536):
                    self.text += data.decode(errors="replace")
                    continue
            raise AssertionError(f"{pattern!r} did not come before the end: {self.text[self.place :]!r}")
        self.place = match.end()
        return match

    def press_until(self, keys: str, expected: str, seconds: float = 20) -> None:
        """Press these keys again and again until the expected text is shown."""
        end = time.monotonic() + seconds
        while expected not in self.text[self.place :]:
            assert time.monotonic() < end, f"{expected!r} did not come; there is {self.text[self.place :]!r}"
            self.keys(keys)
            if select.select([self.fd], [], [], 0.2)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        self.place = len(self.text)

    def code(self) -> int:
        """Wait for the child to end and return its exit code."""
        with contextlib.suppress(OSError):
            while data := os.read(self.fd, 65536):
                self.text += data.decode(errors="replace")
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
