"""A run's log.jsonl and samples.jsonl, read while they grow: curves, answers, evaluations.

A line that is only half written yet, or damaged, is left out. This file knows no process and no window.
"""

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from onecard.runs.folder import FINISHED, LOG, SAMPLES, record_of

LOSS, VALIDATION, ACCURACY, RATE = "loss", "eval_loss", "eval_token_accuracy", "learning_rate"
SPEED, SECONDS = "speed", "seconds"  # tokens a second; seconds of a step
RECENT = 10  # steps that `latest` is the mean of
TAIL = 1 << 16  # bytes that surely hold the last line


class Evaluations(NamedTuple):
    """What a log says of the evaluations so far."""

    last_step: int  # of the last one; -1 before the first
    best_step: int  # with the lowest validation loss after step 0; 0 while there is none
    best_loss: float | None  # nats per target token


def last_step(folder: Path) -> int:
    """The last optimizer step in a run's log; 0 without any."""
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            return max((record["step"] for record in _records(file.read())), default=0)
    except OSError:
        return 0


def evaluations(folder: Path) -> Evaluations:
    """The evaluations in a run's log so far; one whose loss is not a number is never the best."""
    losses = [
        (record["step"], record[VALIDATION])
        for record in records(folder / LOG)
        if isinstance(record.get(VALIDATION), float)
    ]
    later = [(loss, step) for step, loss in losses if step > 0 and not math.isnan(loss)]
    best_loss, best = min(later, default=(None, 0))
    return Evaluations(max((step for step, _ in losses), default=-1), best, best_loss)


def best_step(folder: Path) -> int | None:
    """The step with the lowest validation loss after step 0; None without one."""
    return evaluations(folder).best_step or None


def last_sampled(folder: Path) -> int:
    """The step of the last answers in samples.jsonl; -1 without any."""
    return max((record["step"] for record in records(folder / SAMPLES)), default=-1)


def samples(folder: Path) -> dict[int, list[dict[str, str]]]:
    """Step -> answers (instruction, input, answer) to the fixed prompts, in the order of the steps.

    A finished run without rounds of answers gives the answers from before and after it.
    """
    path = folder / SAMPLES
    try:
        now = path.stat()
        return _parsed(path, now.st_ino, now.st_size, now.st_mtime_ns)
    except OSError:
        return _before_and_after(folder)


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, *_: int) -> dict[int, list[dict[str, str]]]:
    """The answers in a file as it was at that moment."""
    by_step, keys = {}, ("instruction", "input", "answer")
    for record in _records(path.read_bytes()):
        answers = record.get("answers")
        if isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
            by_step[record["step"]] = [{key: str(a.get(key, "")) for key in keys} for a in answers]
    return dict(sorted(by_step.items()))


def _before_and_after(folder: Path) -> dict[int, list[dict[str, str]]]:
    try:
        finished = json.loads((folder / FINISHED).read_text(encoding="utf-8"))
        answers, steps = finished["answers"], int(finished["steps"])
        keys = ("instruction", "input")
        return {
            step: [{**{key: str(a[key]) for key in keys}, "answer": str(a[when])} for a in answers]
            for step, when in ((0, "before"), (steps, "after"))
            if answers
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


class Curves:
    """The numbers of one log; refresh() reads only what is new. Several threads may use it."""

    def __init__(self, folder: Path):
        self.path, self.lock = folder / LOG, threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.inode, self.offset = None, 0
        names = (LOSS, VALIDATION, ACCURACY, RATE, SPEED, SECONDS)
        self.points: dict[str, list[tuple[int, float]]] = {name: [] for name in names}

    def refresh(self) -> None:
        """Read what follows the last whole line; everything when the run went back to an earlier step."""
        with self.lock, contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self.path.open("rb"))
            except OSError:
                self._forget()
                return
            now = os.fstat(file.fileno())
            if now.st_ino != self.inode or now.st_size < self.offset:
                self._forget()
                self.inode = now.st_ino
            file.seek(self.offset)
            content = file.read()
            self.offset += content.rfind(b"\n") + 1
            for record in _records(content):
                self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        if _is_number(record.get("seconds")) and _is_number(record.get("tokens")):
            record[SPEED] = record["tokens"] / max(record["seconds"], 1e-9)
        for name, points in self.points.items():
            if _is_number(record.get(name)):
                points.append((record["step"], float(record[name])))

    def thinned(self, name: str, most: int) -> list[tuple[int, float]]:
        """At most `most` points (step, value): means of neighbours, each at the last one's step."""
        with self.lock:
            points = list(self.points[name])
        size = -(-len(points) // most) or 1
        groups = (points[i : i + size] for i in range(0, len(points), size))
        return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]

    def latest(self) -> dict[str, float]:
        """The last values, means of a few steps but for the evaluations."""
        with self.lock:
            ends = {
                name: points[-1 if name in (VALIDATION, ACCURACY) else -RECENT :]
                for name, points in self.points.items()
            }
        return {name: sum(v for _, v in end) / len(end) for name, end in ends.items() if end}


def _records(content: bytes) -> Iterator[dict[str, Any]]:
    """The whole records with a step among these lines."""
    records = (record_of(line) for line in content.splitlines(keepends=True))
    return (record for record in records if record is not None)


def records(path: Path) -> list[dict[str, Any]]:
    """The whole records in a log; none when there is no such file."""
    return list(_records(path.read_bytes())) if path.is_file() else []


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a plot can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
