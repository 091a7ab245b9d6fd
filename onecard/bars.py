"""The bar that a tool shows while bytes go by."""

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm

Say, Progress = Callable[[str], None], Callable[[int, int], None]


@contextlib.contextmanager
def over_bytes(title: str) -> Iterator[tuple[Say, Progress]]:
    """(say, progress): lines above the bar, and progress(done, all) in bytes; no bar without a terminal."""
    with tqdm(desc=title, unit="B", unit_scale=True, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield bar.write, progress
