"""What names of the hub mean in one command, or in one request to a service: each is asked for and said once.

Within a session a name means one commit, even when its branch moves meanwhile. A later session asks again, so
a process that lives for weeks sees the move. Nothing here outlives the block or the object that owns it.
"""

import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass
class Session:
    """What the hub has answered so far; several threads may share it."""

    # (name as it was typed, kind, patterns of files) -> folder at the commit that the name means
    folders: dict[tuple[str, str, tuple[str, ...]], Path] = dataclasses.field(default_factory=dict)
    answered: set[Path] = dataclasses.field(default_factory=set)  # those whose other files may be fetched
    looked_up: set[str] = dataclasses.field(default_factory=set)  # recorded versions whose name was looked up
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)


_current: contextvars.ContextVar[Session | None] = contextvars.ContextVar("session", default=None)


@contextlib.contextmanager
def session() -> Iterator[Session]:
    """Names keep their meaning while the block runs. Inside of another such block it is the outer session.

    A thread that is started in the block has no session, unless it runs in a copy of the context
    (contextvars.copy_context).
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    inner = Session()
    token = _current.set(inner)
    try:
        yield inner
    finally:
        _current.reset(token)


def current() -> Session:
    """The session of this thread; outside of any a new one, so that every call asks the hub anew."""
    return _current.get() or Session()
