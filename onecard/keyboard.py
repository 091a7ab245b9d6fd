"""What is typed: a line of a pipe, and Ctrl-C. What is edited in a terminal: line_editor.py.

It does not know what a message means.
"""

import contextlib
import signal
import sys
import termios
from collections.abc import Callable, Iterator


def plain_line() -> str:
    """The next line of stdin with those that a backslash adds to it; raises EOFError behind the last."""
    lines = []
    while line := sys.stdin.readline():
        line = line.rstrip("\r\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            break
    if not lines:
        raise EOFError
    return "\n".join(lines)


@contextlib.contextmanager
def stoppable(live: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the answer to end; other keys wait for the prompt, unseen so that nothing is drawn over."""
    if not live:
        yield lambda: False
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    keyboard = termios.tcgetattr(sys.stdin)
    flags = keyboard[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*keyboard[:3], flags, *keyboard[4:]])
    try:
        yield lambda: bool(pressed)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, keyboard)
        signal.signal(signal.SIGINT, handler)
