"""What the value of an option may be: each check returns what is wrong with a value, or None."""

import re
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]
COMMIT = re.compile(r"[0-9a-f]{40}")  # a full commit of git


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"must be {low} or more"


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must be from {low} to {high}"


def above(low: float) -> Check:
    return lambda value: None if value > low else f"must be above {low}"


def fraction(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be 0 or more and below 1"


def auto_or_at_least(low: int) -> Check:
    return lambda value: None if value == "auto" or value >= low else f"must be auto, or {low} or more"


def one_of(*values: Any) -> Check:
    """For options that take words and numbers, which `choices` cannot tell apart."""
    return lambda value: None if value in values else f"choose from {', '.join(map(str, values))}"


def rows_or_fraction(value: float) -> str | None:
    if value < 0 or (value >= 1 and value != int(value)):
        return "must be a fraction below 1 or a whole number of rows"
    return None


def full_commit(value: str) -> str | None:
    problem = "must be a full commit: 40 characters 0-9 and a-f; a branch or a tag is not enough"
    return None if COMMIT.fullmatch(value) else problem
