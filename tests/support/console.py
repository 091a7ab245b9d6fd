"""What a piece of work says to its user, text by text."""

import contextlib
import io
from collections.abc import Iterator


class _Heard(io.TextIOBase):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> int:
        if text != "\n":  # print() and tqdm.write() write the end of the line apart
            self.texts.append(text)
        return len(text)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """The texts that are said or printed in the block, as many as there are so far."""
    stream = _Heard()
    with contextlib.redirect_stdout(stream):
        yield stream.texts
