"""How often a child process may be started again: one that ends again and again is left alone for a while."""

import math
import time
from collections.abc import Callable
from pathlib import Path

from onecard.errors import CHECKPOINT, UserError

WINDOW = 60.0  # seconds in which starts are counted
FREE = 4  # starts within that time, the first one included, that need no pause
LONGEST = 30.0  # seconds between two starts


class Restarts:
    """The starts of one model's child process."""

    def __init__(self, gguf: Path, clock: Callable[[], float] = time.monotonic):
        self.gguf, self.clock = gguf, clock
        self.starts: list[float] = []

    def started(self) -> None:
        now = self.clock()
        self.starts = [*(start for start in self.starts if now - start < WINDOW), now]

    def check(self) -> None:
        """Raise UserError (exit 4) while it is too early for another start: 2 s, then 4, 8 ... 30 s."""
        now = self.clock()
        recent = [start for start in self.starts if now - start < WINDOW]
        if len(recent) < FREE:
            return
        pause = min(2.0 ** (len(recent) - FREE + 1), LONGEST)
        left = recent[-1] + pause - now
        if left > 0:
            problem = f"{self.gguf}: llama.cpp was started {len(recent)} times within {WINDOW:.0f} s."
            raise UserError(
                problem, f"Ask again in {math.ceil(left)} s; then it is started anew.", CHECKPOINT
            )
