"""Models are built one at a time in a process: what transformers switches meanwhile holds for all threads.

Both of its ways to build a model set torch's default dtype to the model's and then back to what they found,
and loading also replaces the tying of weights. Two builds that overlap take each other's values, and put back
the wrong ones; peft makes adapters in whatever dtype is the default then. This file knows no torch.
"""

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.RLock()  # who builds may build a part of it


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other thread of this process builds a model or an adapter while the block runs."""
    with _lock:
        yield
