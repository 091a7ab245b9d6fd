"""What a check of rows counted, and its reports: as text, as an HTML page and as a plot."""

import dataclasses
import html
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from onecard.data import preview
from onecard.system import files as system_files

BUCKETS = 12  # of the histogram
PADDED = 4  # rows of the padded micro-batches that packing is compared with


@dataclasses.dataclass
class Findings:
    """Counts over all rows that were checked."""

    read: int = 0  # rows, usable or not
    schemas: Counter = dataclasses.field(default_factory=Counter)  # name of a schema -> rows
    turns: Counter = dataclasses.field(default_factory=Counter)  # number of answers in a row -> rows
    problems: Counter = dataclasses.field(default_factory=Counter)  # name of a problem -> rows
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # problem -> the first row with it
    lengths: list[int] = dataclasses.field(default_factory=list)  # tokens of each usable row before the cut
    cut_lengths: list[int] = dataclasses.field(default_factory=list)  # after it, of rows with a target left
    targets: int = 0  # tokens
    cut: int = 0  # rows that are longer than --cutoff_len
    # where a row is, and its texts with whether they are learned
    shown: list[tuple[str, list[tuple[str, bool]]]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class RowReport:
    """One row as it stands in its file, and what is wrong with it."""

    location: str
    value: Any
    problems: list[str]
    reason: str = ""  # why it is unreadable, if it is


def report(findings: Findings, cutoff_len: int, width: int = 40) -> str:
    """The findings as text: counts, a histogram of lengths, the problems, and the cost of an epoch."""
    names = ", ".join(f"{name} {count}" for name, count in findings.schemas.most_common()) or "none"
    lines = [f"rows        {findings.read}", f"schema      {names}"]
    if findings.turns:
        lengths = np.array(findings.lengths or [0])
        answers = ", ".join(f"{turns}: {count}" for turns, count in sorted(findings.turns.items())[:8])
        if set(findings.turns) != {0}:
            lines.append(f"answers     {answers} (number of answers in a row: number of rows)")
        lines.append(
            f"tokens      {int(lengths.sum())}; the median row has {int(np.median(lengths))}, "
            f"the longest {int(lengths.max())}; {findings.targets} are targets"
        )
        lines.append(f"cut         {findings.cut} rows are longer than {cutoff_len} tokens")
        lines += ["", *histogram(lengths, cutoff_len, width), ""]
    for problem in sorted(findings.problems, key=lambda name: -findings.problems[name]):
        lines.append(
            f"{findings.problems[problem]:>7}  {problem}; the first row: {findings.examples[problem]}"
        )
    if not findings.problems:
        lines.append("No problem was found.")
    lines += ["", *cost(findings)]
    return "\n".join(lines)


def histogram(lengths: np.ndarray, cutoff_len: int, width: int) -> list[str]:
    """Lines of a bar chart of row lengths in tokens; the bar that holds cutoff_len is marked."""
    edges = _edges(lengths)
    counts, _ = np.histogram(lengths, edges)
    lines = []
    for count, low, high in zip(counts, edges, edges[1:], strict=False):
        bar = "█" * max(int(count > 0), round(width * count / max(counts.max(), 1)))
        mark = "  <- cutoff_len" if low <= cutoff_len < high else ""
        lines.append(f"{int(low):>7} - {int(high) - 1:<7}{bar} {count}{mark}")
    return lines


def _edges(lengths: np.ndarray) -> np.ndarray:
    """Edges of buckets of equal width up to the 99th percentile; the last bucket reaches the longest row."""
    start = int(lengths.min())
    step = max(1, -(-int(np.percentile(lengths, 99) + 1 - start) // BUCKETS))
    edges = start + np.arange(0, BUCKETS + 1) * step
    edges[-1] = max(edges[-1], lengths.max() + 1)
    return edges


def cost(findings: Findings) -> list[str]:
    """Lines that say how many tokens an epoch computes, packed and padded."""
    lengths = findings.cut_lengths
    if not lengths:
        return ["No row can be trained on."]
    padded = sum(
        max(lengths[start : start + PADDED]) * len(lengths[start : start + PADDED])
        for start in range(0, len(lengths), PADDED)
    )
    saved = 100 * (1 - sum(lengths) / padded)
    return [
        f"An epoch computes {sum(lengths)} tokens: rows are packed, and nothing is padded. If every",
        f"{PADDED} rows were padded to the longest of them, it would compute {padded} tokens: packing saves",
        f"{saved:.0f} %.",
    ]


def write_html(findings: Findings, title: str, text: str, path: Path) -> None:
    """Write one HTML file: the report, and the first rows with their target tokens coloured."""
    rows = []
    for location, runs in findings.shown:
        rows.append(f"<h2>{html.escape(location)}</h2><pre>{preview.marked(runs)}</pre>")
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #8881; padding: .8rem; }}
mark {{ background: #ffd54a; color: #000; }} h2 {{ font-size: .9rem; margin: 1.5rem 0 .3rem; color: #888; }}
:root {{ color-scheme: light dark; }}</style>
<h1>{html.escape(title)}</h1><pre>{html.escape(text)}</pre>
<p>The first {len(rows)} rows as the model sees them. The model learns to write the <mark>marked text</mark>,
end tokens included; it only reads the rest.</p>{"".join(rows)}</html>
"""
    system_files.replace(path, page.encode("utf-8", errors="replace"))


def plot_lengths(tokens: list[int], cutoff_len: int, path: Path) -> None:
    """Save a histogram of row lengths in tokens, with a line at cutoff_len."""
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
