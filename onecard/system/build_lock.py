"""Models are built one at a time in a process: what transformers changes meanwhile changes for all threads.

Both of its ways to build a model set torch's default dtype to that of the model, and restore the old one
afterwards. Loading also replaces the function that ties weights. Two builds at the same time would restore
each other's values, and peft would create adapters in the wrong default dtype. This file knows no torch.
"""

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.RLock()  # the thread that builds a model may build parts of it


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other thread of this process builds a model or an adapter while the block runs."""
    with _lock:
        yield
