"""What a run reports: log.jsonl, a progress bar or lines on the screen, W&B if asked for, and loss.png.

This file does not know how training works: it receives records.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.runs.folder import LOG, SAMPLES
from onecard.system import console
from onecard.system import files as system_files
from onecard.system.files import disk_error
from onecard.training import wandb_run


class MetricLogger:
    """The log of a run and what it shows on the screen. Only the main process writes and shows anything."""

    def __init__(
        self, folder: Path, total_steps: int, total_rows: int, log_steps: int, wandb: dict | None, loud: bool
    ):
        """wandb: settings to show in W&B, or None to do without it; loud: whether this process reports."""
        self.loud, self.log_steps = loud, log_steps
        self.total_steps, self.total_rows = total_steps, total_rows
        self.show_bars = loud and sys.stderr.isatty()
        self.file = (
            (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            if loud
            else None
        )
        self.wandb = wandb_run.start(folder, wandb) if loud and wandb is not None else None
        self.bar: tqdm | None = None
        self.started, self.rows_before = 0.0, 0

    def begin(self, rows_seen: int) -> None:
        """Start the progress bar and the clock, right before the first step of this process."""
        self.bar = tqdm(
            total=self.total_rows, initial=rows_seen, unit="row", desc="training", disable=not self.show_bars
        )
        self.started, self.rows_before = time.monotonic(), rows_seen

    def end(self) -> None:
        """Remove the progress bar after the last step, if there is one."""
        if self.bar is not None:
            self._show(self.bar.close)

    def advance(self, rows: int) -> None:
        """Move the progress bar by so many rows."""
        self._show(lambda: self.bar.update(rows))

    def sync(self) -> None:
        """Write the log to the disk, so that it survives a power failure. Raises UserError (exit 7)."""
        if self.file:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise disk_error(Path(self.file.name), error) from None

    def step(self, record: dict[str, Any]) -> None:
        """Log one optimizer step and show it."""
        self._write(record)
        rows_seen = record["rows_seen"]
        seconds = max(time.monotonic() - self.started, 1e-9)
        left = seconds * (self.total_rows - rows_seen) / (rows_seen - self.rows_before)
        rows, tokens = record["rows"] / record["seconds"], record["tokens"] / record["seconds"]
        speed = f"{rows:.2f} rows/s, {tokens:.0f} tokens/s"
        memory = f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
        shown = f"step {record['step']}/{self.total_steps}, loss {record['loss']:.3f}, {speed}, {memory}"
        self.bar.n = rows_seen
        self._show(lambda: self.bar.set_postfix_str(shown))
        due = record["step"] % self.log_steps == 0 or record["step"] == self.total_steps
        if self.loud and not self.show_bars and due:  # no terminal: lines instead of a bar
            position = f"step {record['step']}/{self.total_steps}"
            console.say(f"{position}  loss {record['loss']:.3f}  {speed}  {memory}  {left:.0f} s left")

    def evaluation(self, record: dict[str, Any]) -> None:
        """Log one evaluation and print it."""
        self._write(record)
        accuracy = f"{100 * record['eval_token_accuracy']:.1f} % of target tokens right"
        self.say(f"validation at step {record['step']}: loss {record['eval_loss']:.4f}, {accuracy}")

    def samples(self, record: dict[str, Any]) -> None:
        """Append the answers to the validation prompts of one step to samples.jsonl."""
        if self.file:
            path = Path(self.file.name).with_name(SAMPLES)
            try:
                text = json.dumps(record, ensure_ascii=False) + "\n"
                system_files.append(path, text.encode("utf-8", errors="backslashreplace"))
            except OSError as error:
                raise disk_error(path, error) from None

    def event(self, record: dict[str, Any]) -> None:
        """Log anything else that matters later, such as why a run stopped."""
        self._write(record)

    def say(self, text: str) -> None:
        """Print a line, in the main process only."""
        if self.loud:
            console.say(text)

    def close(self) -> None:
        """Remove the progress bar, and close the log and W&B."""
        self.end()
        if self.file:
            with contextlib.suppress(OSError):  # a failed write was reported when it happened
                self.file.close()
        if self.wandb:
            self.wandb.finish()

    def _show(self, change: Callable[[], object]) -> None:
        """Change the progress bar, or disable it when the terminal is gone."""
        try:
            change()
        except OSError:
            self.bar.disable = True

    def _write(self, record: dict[str, Any]) -> None:
        if self.file:
            try:
                self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
            except OSError as error:
                raise disk_error(Path(self.file.name), error) from None
        if self.wandb:
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self.wandb.log(numbers)


def loss_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Save a plot of training loss, validation loss and learning rate over the steps of a run.

    records: the lines of log.jsonl.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws into a file, not into a window
    from matplotlib.figure import Figure

    steps = [r for r in records if isinstance(r.get("loss"), float)]
    evaluations = [r for r in records if "eval_loss" in r]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        [r["step"] for r in steps], [r["loss"] for r in steps], color="#4477aa", alpha=0.35, label="training"
    )
    axes.plot(
        [r["step"] for r in steps],
        _smooth([r["loss"] for r in steps]),
        color="#4477aa",
        label="training, smoothed",
    )
    if evaluations:
        axes.plot(
            [r["step"] for r in evaluations],
            [r["eval_loss"] for r in evaluations],
            "o-",
            color="#cc6677",
            label="validation",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rate.plot(
        [r["step"] for r in steps],
        [r["learning_rate"] for r in steps],
        color="#999999",
        linewidth=0.8,
        linestyle=":",
    )
    rate.set_ylabel("learning rate (dotted)", color="#777777")
    system_files.save_figure(figure, path)


def _smooth(values: list[float], keep: float = 0.8) -> list[float]:
    """Exponential running average with the factor `keep`, corrected for its start at zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
