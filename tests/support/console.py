"""Collects the texts that a program prints for its user."""

import contextlib
import io
from collections.abc import Iterator


class _Heard(io.TextIOBase):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> int:
        if text != "\n":  # print() and tqdm.write() write the end of a line separately
            self.texts.append(text)
        return len(text)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list that grows by every text that is printed in the block."""
    stream = _Heard()
    with contextlib.redirect_stdout(stream):
        yield stream.texts
