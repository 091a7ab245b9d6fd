"""The bar that a tool shows while bytes go by."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from tqdm import tqdm

from onecard.system import processes as system_processes

Say, Progress = Callable[[str], None], Callable[[int, int], None]


@contextlib.contextmanager
def over_bytes(title: str) -> Iterator[tuple[Say, Progress]]:
    """(say, progress): lines above the bar, and progress(done, all) in bytes; no bar without a terminal."""
    with tqdm(desc=title, unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield bar.write, progress


def say(text: str) -> None:
    """Print for the user, from the main process only; when nobody reads any more, the run goes on unheard."""
    if system_processes.is_main():
        write_out(lambda: print(text, flush=True))


def write_out(write: Callable[[], object]) -> None:
    try:
        write()
    except OSError:  # a closed pipe or terminal
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (kept for good)
