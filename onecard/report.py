"""Pictures of a run and of rows."""

from pathlib import Path
from typing import Any


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
    _save(figure, path)


def lengths(tokens: list[int], cutoff_len: int, path: Path) -> None:
    """Draw how long rows are, in tokens, and where they are cut."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(tokens, bins=40, color="#4477aa")
    axes.axvline(cutoff_len, color="#cc6677", label=f"cutoff_len {cutoff_len}")
    axes.set(xlabel="tokens of a row", ylabel="rows")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)


def _smooth(values: list[float], keep: float = 0.8) -> list[float]:
    """Running average that forgets by `keep` each step, without the start's bias."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
