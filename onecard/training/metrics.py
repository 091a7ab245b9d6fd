"""What a run tells: log.jsonl (the truth), a bar or lines on the screen, W&B on request, and loss.png.

It does not know how training works; it is given records.
"""

import contextlib
import json
import netrc
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.errors import UserError
from onecard.runs.folder import LOG, SAMPLES
from onecard.system import commands, console
from onecard.system import files as system_files
from onecard.system.files import disk_error


class Journal:
    """One object per run; only the main process makes a loud one. close() ends it."""

    def __init__(
        self, folder: Path, total_steps: int, total_rows: int, log_steps: int, wandb: dict | None, loud: bool
    ):
        """wandb: the settings to show there, or None for no W&B; loud: whether this process speaks at all."""
        self.loud, self.log_steps = loud, log_steps
        self.total_steps, self.total_rows = total_steps, total_rows
        self.show_bars = loud and sys.stderr.isatty()
        self.file = (folder / LOG).open("a", encoding="utf-8", buffering=1) if loud else None
        self.wandb = start_wandb(folder, wandb) if loud and wandb is not None else None
        self.bar: tqdm | None = None
        self.started, self.rows_before = 0.0, 0

    def begin(self, rows_seen: int) -> None:
        """Start the bar and the clock of the time left, right before the first step of this process."""
        self.bar = tqdm(
            total=self.total_rows, initial=rows_seen, unit="row", desc="training", disable=not self.show_bars
        )
        self.started, self.rows_before = time.monotonic(), rows_seen

    def end(self) -> None:
        """Take the bar down after the last step; harmless when there is none."""
        if self.bar is not None:
            self._show(self.bar.close)

    def advance(self, rows: int) -> None:
        self._show(lambda: self.bar.update(rows))

    def sync(self) -> None:
        """Have what was written so far survive a power failure."""
        if self.file:
            try:
                os.fsync(self.file.fileno())
            except OSError as error:
                raise disk_error(Path(self.file.name), error) from None

    def step(self, record: dict[str, Any]) -> None:
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
            place = f"step {record['step']}/{self.total_steps}"
            console.say(f"{place}  loss {record['loss']:.3f}  {speed}  {memory}  {left:.0f} s left")

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write(record)
        accuracy = f"{100 * record['eval_token_accuracy']:.1f} % of target tokens right"
        self.say(f"validation at step {record['step']}: loss {record['eval_loss']:.4f}, {accuracy}")

    def samples(self, record: dict[str, Any]) -> None:
        """Answers to the fixed prompts; they have a file of their own."""
        if self.file:
            path = Path(self.file.name).with_name(SAMPLES)
            try:
                with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
            except OSError as error:
                raise disk_error(path, error) from None

    def event(self, record: dict[str, Any]) -> None:
        """Anything else worth keeping, such as why a run stopped."""
        self._write(record)

    def say(self, text: str) -> None:
        if self.loud:
            console.say(text)

    def close(self) -> None:
        self.end()
        if self.file:
            with contextlib.suppress(OSError):  # what could not be written was told when it was tried
                self.file.close()
        if self.wandb:
            self.wandb.finish()

    def _show(self, change: Callable[[], object]) -> None:
        """Change the bar; without a terminal any more there is none."""
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
            self.wandb.log(numbers, step=record["step"])


def start_wandb(folder: Path, settings: dict[str, Any]) -> Any:
    """A W&B run; WANDB_MODE=offline keeps it in `folder`. Raises UserError when the package is missing."""
    check_wandb()
    import wandb

    try:
        return wandb.init(project="onecard", name=folder.name, dir=str(folder), config=settings)
    except wandb.errors.Error as error:
        fix = f"Run {commands.in_environment('wandb')} login, or set WANDB_MODE=offline."
        raise UserError(f"--wandb: Weights & Biases did not start: {error}", fix) from None


def check_wandb() -> None:
    """Raise UserError when W&B cannot be used, before anything is trained."""
    import importlib.util

    if importlib.util.find_spec("wandb") is None:
        fix = f"Run: {commands.extra('wandb')}"
        raise UserError("--wandb needs the package wandb, which is not installed.", fix)
    if os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_API_KEY"):
        try:
            known = netrc.netrc().hosts
        except (OSError, netrc.NetrcParseError):
            known = {}
        if not any("wandb" in host for host in known):
            fix = f"Run {commands.in_environment('wandb')} login, or set WANDB_MODE=offline."
            raise UserError("--wandb: this machine is not logged in to Weights & Biases.", fix)


def loss_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Draw training loss, validation loss and learning rate of a run's log records over its steps."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib.figure import Figure

    steps = [r for r in records if isinstance(r.get("loss"), float)]
    checks = [r for r in records if "eval_loss" in r]
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
    if checks:
        axes.plot(
            [r["step"] for r in checks],
            [r["eval_loss"] for r in checks],
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
    """Running average that forgets by `keep` each step, without the start's bias."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
