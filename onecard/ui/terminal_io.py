"""Screen and keyboard of a terminal, or a pipe: answers as they grow, lines that are read, Ctrl-C.

Stable text is printed once and for all; text that may still change is drawn behind it and erased again. No
control character of an answer reaches the terminal. This file knows no models, conversations or commands.
"""

import contextlib
import re
import shutil
import signal
import sys
import termios
from collections.abc import Callable, Iterator

from wcwidth import wcwidth

MARK, BACK = "\x1b7", "\x1b8\x1b[J"  # save the cursor's position; restore it and erase everything behind it
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # except tab and new line: a terminal would obey them


def tell(text: str) -> None:
    """Print what is not an answer: on stdout in a terminal, else on stderr, as a pipe takes answers only."""
    print(visible(text), file=sys.stdout if in_terminal() else sys.stderr, flush=True)


def in_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def visible(text: str) -> str:
    """The text without the control characters that a terminal would obey."""
    return CONTROLS.sub("", text)


def emit(text: str) -> None:
    print(text, end="", flush=True)


def column_after(text: str, column: int, width: int) -> int:
    """The column of the cursor after a text; `width`: the line is full and the next letter wraps."""
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
    """Shows one answer after the other: stable text, and behind it, dim, what may still change."""

    def __init__(self, live: bool):
        """live: the terminal can erase text; otherwise only stable text is printed."""
        self.live = live
        self.shown, self.column, self.drawn = "", 0, False

    def show(self, stable: str, behind: str = "") -> None:
        """Print what is new in the stable text, and as much of `behind` as fits into the line."""
        text, new = visible(stable), ""
        if not text.startswith(self.shown):  # a tokenizer decoded the whole differently: print it once more
            self.shown, new = "", "\n"
        new += text[len(self.shown) :]
        width = shutil.get_terminal_size().columns
        self.shown, self.column = text, column_after(new, self.column, width)
        rest = self._fitting(visible(behind), width - 1) if self.live else ""
        out = (BACK if self.drawn else "") + new
        emit(f"{out}{MARK}{DIM}{rest}{PLAIN}" if rest else out)
        self.drawn = bool(rest)

    def end(self, always: bool = True) -> None:
        """Finish the answer and begin a new line; always: also when the answer is empty."""
        emit((BACK if self.drawn else "") + ("\n" if always or self.shown else ""))
        self.shown, self.column, self.drawn = "", 0, False

    def remark(self, text: str) -> None:
        emit(f"{DIM}{text}{PLAIN}\n" if self.live else f"{text}\n")

    def _fitting(self, text: str, last: int) -> str:
        """As much as fits before the last column of the line, in which terminals behave differently."""
        column, text = self.column, text.split("\n")[0].replace("\t", " ")
        while text and wcwidth(text[0]) <= 0:  # it would combine with the stable letter before it
            text = text[1:]
        for place, letter in enumerate(text):
            column += max(wcwidth(letter), 0)
            if column > last:
                return text[:place]
        return text


def plain_line() -> str:
    """The next line of stdin, with the following ones while a line ends in \\; raises EOFError at the end."""
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
    """Let Ctrl-C end the answer instead of the program; it yields a function that says if it was pressed.

    Other keys wait for the prompt and are not echoed, since they would appear in the middle of the answer.
    """
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
