"""The learning rate of every update of a run.

A schedule has a warm-up and then a curve, whose progress goes from 0 to 1. A run that continues on more rows
than its plan foresaw stretches the rest of its curve, so that the learning rate does not jump.
"""

import math
from typing import NamedTuple

from onecard.config.training import FinetuneConfig


class Anchor(NamedTuple):
    """The point from which the rest of a schedule is stretched to the end of a longer plan."""

    updates: int  # before this point; at least those of the warm-up
    progress: float  # of the curve there: 0 to 1


def learning_rate(
    options: FinetuneConfig, updates: int, total: int, warmup: int, anchor: Anchor | None = None
) -> float:
    """Learning rate of the update after `updates` others, by the schedules of transformers.get_scheduler.

    total, warmup: updates of the run, and of its warm-up; anchor: where the curve was stretched, if it was.
    """
    if updates < warmup:
        return options.learning_rate * updates / warmup
    done = progress(updates, total, warmup, anchor)
    factors = {"linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done)), "constant": 1.0}
    return options.learning_rate * max(0.0, factors[options.lr_scheduler])


def progress(updates: int, total: int, warmup: int, anchor: Anchor | None = None) -> float:
    """How much of the curve after the warm-up is done after `updates` updates: 0 to 1."""
    start, done = anchor or Anchor(warmup, 0.0)
    return done + (1 - done) * ((updates - start) / max(1, total - start))
