"""Screen and keyboard of a terminal, or a pipe: answers as they grow, lines that are read, Ctrl-C.

Text that is certain is printed for good, the rest until it is certain. Nothing of an answer steers the
terminal. It does not know models, conversations or commands.
"""

import contextlib
import re
import shutil
import signal
import sys
import termios
from collections.abc import Callable, Iterator

from wcwidth import wcwidth

from onecard.system import commands

MARK, BACK = "\x1b7", "\x1b8\x1b[J"  # remember this place; go back to it and erase what is behind it
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and new line: they steer a terminal


def check_editor(part: str) -> None:
    """Raise UserError when a terminal is to be read and prompt_toolkit is not installed; pipes need it not.

    part: of the set-up that installs it. To be asked before anything that takes time.
    """
    if in_terminal():
        commands.require("prompt_toolkit", part)


def tell(text: str) -> None:
    """What is no answer: into the terminal, or beside the pipe that answers go into."""
    print(visible(text), file=sys.stdout if in_terminal() else sys.stderr, flush=True)


def in_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def visible(text: str) -> str:
    """Without what a terminal would obey."""
    return CONTROLS.sub("", text)


def emit(text: str) -> None:
    print(text, end="", flush=True)


def column_after(text: str, column: int, width: int) -> int:
    """Where the cursor of a terminal is behind a text; `width` itself: the next letter wraps."""
    for letter in text:
        if letter == "\n":
            column = 0
        elif letter == "\t":
            column = min(column // 8 * 8 + 8, width - 1)
        else:
            cells = max(wcwidth(letter), 0)
            column = column + cells if column + cells <= width else cells
    return column


class Screen:
    """One answer after the other: stable text for good; behind it, dim, what may still change."""

    def __init__(self, live: bool):
        """live: the terminal can erase; otherwise only stable text is printed."""
        self.live = live
        self.shown, self.column, self.drawn = "", 0, False

    def show(self, stable: str, behind: str = "") -> None:
        """Print what is new of the stable text, and as much behind it as fits into the line."""
        text, new = visible(stable), ""
        if not text.startswith(self.shown):  # a tokenizer that decodes the whole differently: once more
            self.shown, new = "", "\n"
        new += text[len(self.shown) :]
        width = shutil.get_terminal_size().columns
        self.shown, self.column = text, column_after(new, self.column, width)
        rest = self._fitting(visible(behind), width - 1) if self.live else ""
        out = (BACK if self.drawn else "") + new
        emit(f"{out}{MARK}{DIM}{rest}{PLAIN}" if rest else out)
        self.drawn = bool(rest)

    def end(self, always: bool = True) -> None:
        """Leave the answer behind; always: with a line of its own even when it is empty."""
        emit((BACK if self.drawn else "") + ("\n" if always or self.shown else ""))
        self.shown, self.column, self.drawn = "", 0, False

    def remark(self, text: str) -> None:
        emit(f"{DIM}{text}{PLAIN}\n" if self.live else f"{text}\n")

    def _fitting(self, text: str, last: int) -> str:
        """The beginning that leaves the line's last column free, where terminals differ."""
        column, text = self.column, text.split("\n")[0].replace("\t", " ")
        while text and wcwidth(text[0]) <= 0:  # it would join the stable letter before it
            text = text[1:]
        for place, letter in enumerate(text):
            column += max(wcwidth(letter), 0)
            if column > last:
                return text[:place]
        return text


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
