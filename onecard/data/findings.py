"""What looking at rows has brought to light, and how it is told: as text, as a page, as a plot."""

import dataclasses
import html
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data import preview
from onecard.system import files as system_files

BUCKETS = 12  # of the histogram
PADDED = 4  # rows of a padded micro-batch, the usual recipe's


@dataclasses.dataclass
class Findings:
    """What was found in all rows; lengths are tokens of each usable row, before the cut."""

    read: int = 0
    schemas: Counter = dataclasses.field(default_factory=Counter)
    turns: Counter = dataclasses.field(default_factory=Counter)
    problems: Counter = dataclasses.field(default_factory=Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # problem -> where it was first
    lengths: list[int] = dataclasses.field(default_factory=list)
    cut_lengths: list[int] = dataclasses.field(default_factory=list)
    targets: int = 0
    cut: int = 0
    shown: list[tuple[str, list[tuple[str, bool]]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Row:
    """One row as it stands in its file, and what is wrong with it."""

    place: str
    value: Any
    problems: list[str]
    reason: str = ""  # of an unreadable one


def report(found: Findings, cutoff_len: int, width: int = 40) -> str:
    """The findings as text: counts, a histogram of lengths, problems, what training on it costs."""
    names = ", ".join(f"{name} {count}" for name, count in found.schemas.most_common()) or "none"
    lines = [f"rows        {found.read}", f"schema      {names}"]
    if found.turns:
        lengths = np.array(found.lengths or [0])
        answers = ", ".join(f"{turns}: {count}" for turns, count in sorted(found.turns.items())[:8])
        if set(found.turns) != {0}:
            lines.append(f"answers     {answers} (answers in a row: rows)")
        lines.append(
            f"tokens      {int(lengths.sum())}; median row {int(np.median(lengths))}, "
            f"longest {int(lengths.max())}; {found.targets} are trained"
        )
        lines.append(f"cut         {found.cut} rows are longer than {cutoff_len} tokens")
        lines += ["", *histogram(lengths, cutoff_len, width), ""]
    for problem in sorted(found.problems, key=lambda name: -found.problems[name]):
        lines.append(f"{found.problems[problem]:>7}  {problem}; the first: {found.examples[problem]}")
    if not found.problems:
        lines.append("Nothing that looks wrong.")
    lines += ["", *cost(found)]
    return "\n".join(lines)


def histogram(lengths: np.ndarray, cutoff_len: int, width: int) -> list[str]:
    """Lines of a bar chart of row lengths in tokens, with the cut marked."""
    edges = _edges(lengths)
    counts, _ = np.histogram(lengths, edges)
    lines = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * max(int(count > 0), round(width * count / max(counts.max(), 1)))
        mark = "  <- cutoff_len" if low <= cutoff_len < high else ""
        lines.append(f"{int(low):>7} - {int(high) - 1:<7}{bar} {count}{mark}")
    return lines


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Borders of equal whole steps up to the 99th percentile; the last one reaches the longest."""
    start = int(lengths.min())
    step = max(1, -(-int(np.percentile(lengths, 99) + 1 - start) // BUCKETS))
    edges = start + np.arange(0, BUCKETS + 1) * step
    edges[-1] = max(edges[-1], lengths.max() + 1)
    return edges


def cost(found: Findings) -> list[str]:
    """Tokens an epoch computes, packed and padded."""
    lengths = found.cut_lengths
    if not lengths:
        return ["No row can be trained on."]
    padded = sum(
        max(lengths[start : start + PADDED]) * len(lengths[start : start + PADDED])
        for start in range(0, len(lengths), PADDED)
    )
    saved = 100 * (1 - sum(lengths) / padded)
    return [
        f"An epoch computes {sum(lengths)} tokens: rows are packed, nothing is padded. Padded to the longest",
        f"of every {PADDED} rows it would be {padded} tokens; packing saves {saved:.0f} %.",
    ]


def write_html(found: Findings, title: str, text: str, path: Path) -> None:
    """One file for a browser: the report, and rows with their trained tokens coloured."""
    rows = []
    for place, runs in found.shown:
        rows.append(f"<h2>{html.escape(place)}</h2><pre>{preview.marked(runs)}</pre>")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .8rem; }}
mark {{ background: #ffd54a; color: #000; }} h2 {{ font-size: .9rem; margin: 1.5rem 0 .3rem; color: #888; }}
:root {{ color-scheme: light dark; }}</style>
<h1>{html.escape(title)}</h1><pre>{html.escape(text)}</pre>
<p>The first {len(rows)} rows as the model sees them. <mark>Marked text</mark> is what it learns to say, end
tokens included; the rest is only read.</p>{"".join(rows)}</html>
"""
    system_files.replace(path, page.encode("utf-8", errors="replace"))


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
    system_files.save_figure(figure, path)
