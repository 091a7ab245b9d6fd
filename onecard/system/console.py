"""What a program says to its user: lines on stdout, above any progress bar, and a bar over bytes.

tqdm is imported inside the functions that need it, so that --help does not wait for it.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator

from onecard.system import processes as system_processes

Progress = Callable[[int, int], None]


def accept_any_text() -> None:
    """Let no letter end a program: the output escapes what its encoding lacks, such as \\u6f22 in Latin-1.

    Bytes of the input that are no text become lone surrogates, which its readers refuse or replace.
    """
    handlers = (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    )
    for stream, handler in handlers:
        if isinstance(stream, io.TextIOWrapper):  # not one that a caller put in its place
            stream.reconfigure(errors=handler)


def say(text: str) -> None:
    """Print for the user, from the main process only, above any open progress bar, and at once.

    When the output is closed, the work goes on without printing.
    """
    if system_processes.is_main():
        from tqdm import tqdm

        write_out(lambda: (tqdm.write(text, file=sys.stdout), sys.stdout.flush()))


def write_out(write: Callable[[], object]) -> None:
    """Call `write`; from the first failure on, nothing of this process is printed any more."""
    try:
        write()
    except OSError:  # a closed pipe or terminal
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (kept for good)


@contextlib.contextmanager
def over_bytes(title: str) -> Iterator[Progress]:
    """progress(done, all), in bytes, moves a bar as long as the block lasts; no bar without a terminal."""
    from tqdm import tqdm

    with tqdm(desc=title, unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
