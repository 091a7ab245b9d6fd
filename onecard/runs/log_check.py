"""Whether the log of a run has every step of a checkpoint, which a run needs to go on.

The log says which evaluation was the best so far, so a run that went on with half of it could publish another
adapter. It is synced before each checkpoint, so neither a kill nor a power failure can make it shorter
than the checkpoint.
"""

from pathlib import Path
from typing import Any

from onecard.errors import UserError
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs.checkpoint import Progress
from onecard.runs.folder import LOG, checkpoint_steps, record_of

ROUNDING = 1e-4  # seconds by which the time of a step in the log may differ from the exact one
Records = list[dict[str, Any] | None]  # of the lines of a log; None for a damaged line


def problem(folder: Path, progress: Progress, begun_at: int | None) -> str | None:
    """What the log of a run lacks of a checkpoint's steps, as the end of a sentence; None when it has all.

    begun_at: the step at which the run began; None in runs of earlier versions, when that is unknown. Lines
    after the checkpoint do not count, whatever they are.
    """
    return _lack(_records(folder), progress, begun_at)


def covered(folder: Path, before: int, begun_at: int | None) -> Path | None:
    """The newest checkpoint earlier than step `before` with all of its steps in the log; None without one."""
    records = _records(folder)
    for step in sorted((step for step in checkpoint_steps(folder) if step < before), reverse=True):
        path = folder / f"checkpoint-{step}"
        try:
            progress = runs_checkpoint.verified_progress(path)
        except UserError:
            continue
        if _lack(records, progress, begun_at) is None:
            return path
    return None


def _records(folder: Path) -> Records | None:
    """The records of a run's log; None without a log."""
    path = folder / LOG
    if not path.is_file():
        return None
    return [record_of(line) for line in path.read_bytes().splitlines(keepends=True) if line.strip()]


def _lack(records: Records | None, progress: Progress, begun_at: int | None) -> str | None:
    """What `problem` returns, for the records of a log."""
    if records is None and begun_at is not None and progress.step > begun_at:
        return "is missing"
    records = records or []
    ends = [number for number, record in enumerate(records) if _is_step(record, progress.step)]
    until = ends[0] if ends else len(records) - 1  # what comes later may be cut off
    damaged = [number for number, record in enumerate(records[:until], start=1) if record is None]
    if damaged:
        return f"is damaged in line {damaged[0]}"
    done = [record for record in records if record and _is_step(record) and record["step"] <= progress.step]
    steps = [record["step"] for record in done]
    first = min(steps, default=progress.step + 1) if begun_at is None else begun_at + 1
    missing = sorted({*range(first, progress.step + 1)} - {*steps})
    if missing:
        return f"has no record of {_ranges(missing)}"
    if steps != [*range(first, progress.step + 1)]:
        return "has steps twice or in another order"
    if begun_at is None:
        return None
    tokens, seconds = (sum(record[name] for record in done) for name in ("tokens", "seconds"))
    if tokens != progress.tokens:
        return f"is that of another run: its steps have {tokens} tokens, and not {progress.tokens}"
    if abs(seconds - progress.seconds) > ROUNDING * len(done):
        return f"is that of another run: its steps took {seconds:.2f} s, and not {progress.seconds:.2f}"
    return None


def _is_step(record: dict[str, Any] | None, step: int | None = None) -> bool:
    """Whether a record is that of an optimizer step: of this one, if one is given."""
    numbers = ("tokens", "seconds", "rows_seen")
    is_step = record is not None and all(isinstance(record.get(name), int | float) for name in numbers)
    return is_step and step in (None, record["step"])


def _ranges(steps: list[int]) -> str:
    """The first run of missing steps, and how many more there are."""
    last, missing = steps[0], {*steps}
    while last + 1 in missing:
        last += 1
    text = f"step {last}" if last == steps[0] else f"steps {steps[0]} to {last}"
    more = len(steps) - (last - steps[0] + 1)
    return f"{text} and {more} others" if more else text
