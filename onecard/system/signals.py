"""SIGTERM and Ctrl-C while a run works: stop at once where nothing is lost by it, else a moment later.

The first signal raises Stopped, so the unfinished step is dropped; inside `later()` it waits for the end of
the block, so that an update or a save is never torn. A second Ctrl-C leaves at once.
"""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator

from onecard.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 0.2  # seconds in which a second Ctrl-C is the first one again, passed on by torchrun


@dataclasses.dataclass
class _State:
    number: int | None = None  # the first signal
    arrived: float = 0.0
    is_raised: bool = False  # Stopped was raised for it
    depth: int = 0  # of blocks that must not be torn


_state = _State()


@contextlib.contextmanager
def watch() -> Iterator[None]:
    """Turn the first signal into Stopped while the block runs; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _state
    _state = _State()
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a closed terminal stops no run
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def later() -> Iterator[None]:
    """A block that a signal must not tear: Stopped is raised at its end instead, unless the block failed."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
    _raise_stopped()


def arrived() -> int | None:
    """The number of the first signal; None when there was none."""
    return _state.number


def _on_signal(number: int, frame: object) -> None:
    if _state.number is None:
        _state.number, _state.arrived = number, time.monotonic()
        _raise_stopped()
    elif time.monotonic() - _state.arrived > ECHO:
        if number == signal.SIGINT:
            os._exit(128 + number)
        _state.is_raised = False  # it may have been raised where Python swallows it
        _raise_stopped()


def _raise_stopped() -> None:
    if _state.number is not None and not _state.is_raised and _state.depth == 0:
        _state.is_raised = True
        raise Stopped(_state.number)
