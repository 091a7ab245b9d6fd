"""Looking at rows before they are trained on: what is in a file, what it costs, what should not be in it.

Every row is read once; nothing is changed. `Cleaner` writes what is worth keeping to another file, and beside
it what was left out and why: rows in = rows kept + rows left out.
"""

import dataclasses
import hashlib
import html
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from onecard.config.tools import CheckConfig
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.data import preview, reader
from onecard.data import schemas as data_schemas
from onecard.data import template as templates
from onecard.data.conversation import ASSISTANT, Conversation
from onecard.data.schemas import BadRow
from onecard.data.template import Template
from onecard.errors import UserError
from onecard.system import files as system_files
from onecard.system.console import say

PLACEHOLDERS = re.compile(
    r"<一段文[本字]>|<文本>|\[图[画片]\]|<no ?(in|out)put>|<image>|\[image\]|\[insert [^\]]*\]",
    re.IGNORECASE,
)
# not the joiners U+200C and U+200D, which words and emoji need
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
CONTROL = re.compile(r"<\|[a-z_]{2,20}\|>|</?s>|\[/?INST\]|<<SYS>>")  # of the models people train most
BUCKETS = 12  # of the histogram
SHOWN = 20  # rows of the HTML report
PADDED = 4  # rows of a padded micro-batch, the usual recipe's
UNUSABLE = {  # what `clean` leaves out
    "unreadable": "cannot be used",
    "duplicates": "the same as an earlier row",
    "empty outputs": "an answer is empty",
    "without targets": "no token of an answer is left after the cut",
    "placeholders": "holds placeholder text",
}


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


def check_options(options: CheckConfig) -> None:
    """Raise UserError for options that contradict each other, before anything is fetched."""
    if options.repair and not options.clean:
        raise UserError("--repair mends what --clean writes.", "Add --clean FILE.jsonl.")
    templates.check(options.template)


def run(options: CheckConfig, paths: list[Path], tokenizer: Any) -> None:
    """Look at all rows of these files, say what there is, and write what the options ask for.

    Raises UserError.
    """
    template = templates.load(options.template, tokenizer)
    _check_targets(options, paths)
    findings, how = Findings(), (options.train_on_inputs, options.train_on)
    rows = examine(findings, paths, options.schema, template, tokenizer, options.cutoff_len, *how)
    cleaner = Cleaner(Path(options.clean), options.repair) if options.clean else None
    all_rows(rows, cleaner)
    text = report(findings, options.cutoff_len)
    say(text)
    if cleaner:
        kept, dropped = cleaner.targets
        say(f"\n{cleaner.kept} rows are in {kept}, {cleaner.left_out} with the reason in {dropped}.")
    if options.png and findings.lengths:
        lengths(findings.lengths, options.cutoff_len, Path(options.png))
        say(f"The histogram is in {options.png}.")
    if options.html:
        write_html(findings, f"Rows of {options.data_path}", text, Path(options.html))
        say(f"The report is in {options.html}; open it in a browser.")


def _check_targets(options: CheckConfig, paths: list[Path]) -> None:
    """Raise UserError when a file to write is one that is read, another of them, or in no folder."""
    taken = {path.resolve() for path in paths}
    targets = [("clean", target) for target in outputs(Path(options.clean))] if options.clean else []
    targets += [(name, Path(getattr(options, name))) for name in ("html", "png") if getattr(options, name)]
    for name, target in targets:
        if target.resolve() in taken:
            problem = f"--{name}: {target} is the file that is looked at, or written already."
            raise UserError(problem, "Name another file.")
        if not target.absolute().parent.is_dir():
            raise UserError(f"--{name} {target}: its folder does not exist.", "Make it, or name another.")
        taken.add(target.resolve())


def examine(
    found: Findings,
    paths: list[Path],
    schema: str | None,
    template: Template,
    tokenizer: Any,
    cutoff_len: int,
    *how: Any,
) -> Iterator[Row]:
    """Look at every row, one at a time, and note in `found` what there is."""
    seen: set[bytes] = set()
    control = re.compile("|".join([CONTROL.pattern, *map(re.escape, tokenizer.all_special_tokens)]))
    for path in paths:
        for line, column, value, text in reader.values(path):
            found.read += 1
            row = Row(data_schemas.place(path, line, column), value, [])
            made = reader.conversation(line, column, value, text, schema)
            if isinstance(made, BadRow):
                row.value, row.reason = made.text.strip(), made.reason
                row.problems.append("unreadable")
            else:
                _look(made, row, control, seen)
                _measure(made, found, row, template, tokenizer, cutoff_len, how)
                found.schemas[schema or data_schemas.recognise(value)] += 1
                found.turns[sum(turn.role == ASSISTANT for turn in made.turns)] += 1
            for problem in row.problems:
                found.problems[problem] += 1
                found.examples.setdefault(problem, row.place + (f" ({row.reason})" if row.reason else ""))
            yield row


def _look(made: Conversation, row: Row, control: re.Pattern, seen: set[bytes]) -> None:
    from ftfy import badness

    texts = [text for turn in made.turns for text in (turn.text, turn.input) if text]
    fields = [INVISIBLE.sub("", field) for turn in made.turns for field in turn]
    whole = "\0".join(fields)
    digest = hashlib.blake2b(whole.encode(), digest_size=16).digest()
    asked = [turn for turn in made.turns if turn.role == "user"]
    pairs = zip(made.turns, made.turns[1:], strict=False)
    checks = {
        "duplicates": digest in seen,
        "empty outputs": any(
            not INVISIBLE.sub("", t.text).strip() for t in made.turns if t.role in data_conversation.TARGETS
        ),
        "instruction equal to input": any(t.input and t.text.strip() == t.input.strip() for t in asked),
        "answer equal to question": any(
            b.role == ASSISTANT and a.text.strip() == b.text.strip() for a, b in pairs
        ),
        "placeholders": any(PLACEHOLDERS.search(text) for text in texts),
        "invisible characters": any(INVISIBLE.search(text) for text in texts),
        "mojibake": any(badness.is_bad(text) for text in texts),
        "control tokens": any(control.search(text) for text in texts),
    }
    seen.add(digest)
    row.problems += [name for name, is_so in checks.items() if is_so]


def _measure(
    made: Conversation,
    found: Findings,
    row: Row,
    template: Template,
    tokenizer: Any,
    cutoff_len: int,
    how: tuple,
) -> None:
    try:
        encoded = data_encode.encode(made, template, tokenizer, *how)
        limit = sys.maxsize if made.turns[-1].role == "text" else cutoff_len  # raw text is cut into blocks
        cut, is_target, was_cut = data_encode.shortened(made, encoded, limit, template, tokenizer, *how)
    except ValueError as error:
        row.problems.append("unreadable")
        row.reason = str(error)
        return
    found.lengths.append(len(encoded[0]))
    found.cut += was_cut
    if not any(is_target):
        row.problems.append("without targets")
        return
    found.cut_lengths.append(len(cut))
    found.targets += sum(is_target)
    if len(found.shown) < SHOWN:
        found.shown.append((row.place, data_encode.runs(tokenizer, cut, is_target)))


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


def clean(value: Any, repair: bool) -> Any:
    """A row's value with every text freed of invisible characters and, if asked, of mojibake."""
    if isinstance(value, str):
        if repair:
            import ftfy

            value = ftfy.fix_encoding(value)
        return INVISIBLE.sub("", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no word for it
    if isinstance(value, list):
        return [clean(item, repair) for item in value]
    if isinstance(value, dict):
        return {key: clean(item, repair) for key, item in value.items()}
    return value


def outputs(path: Path) -> tuple[Path, Path]:
    """The files that a Cleaner writes: kept rows, and those left out."""
    return path, path.with_name(f"{path.stem}.dropped.jsonl")


class Cleaner:
    """Writes kept rows to `path` and the others, with the reason, to `<path>.dropped.jsonl`."""

    def __init__(self, path: Path, repair: bool):
        self.repair, self.kept, self.left_out = repair, 0, 0
        self.targets = outputs(path)
        self.temporary = [target.with_name(f".{target.name}.tmp") for target in self.targets]
        self.files = [open(place, "w", encoding="utf-8") for place in self.temporary]  # noqa: SIM115

    def add(self, row: Row) -> None:
        reasons = [UNUSABLE[name] for name in row.problems if name in UNUSABLE]
        try:
            cleaned = clean(row.value, self.repair)
        except RecursionError:
            reasons.append("nested too deeply")
        if reasons:
            self.left_out += 1
            record = {"where": row.place, "why": [row.reason] if row.reason else reasons, "row": row.value}
        else:
            self.kept += 1
            record = cleaned
        text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
        self.files[bool(reasons)].write(text.encode("utf-8", "backslashreplace").decode())

    def done(self, complete: bool) -> None:
        """Put both files in their places, or delete them when not all rows were seen."""
        for file in self.files:
            file.close()
        for temporary, target in zip(self.temporary, self.targets, strict=True):
            temporary.replace(target) if complete else temporary.unlink()


def all_rows(rows: Iterator[Row], cleaner: Cleaner | None) -> None:
    """Go through all rows with a progress bar."""
    complete = False
    try:
        for row in tqdm(rows, desc="looking at rows", unit="row", disable=None):
            if cleaner:
                cleaner.add(row)
        complete = True
    finally:
        if cleaner:
            cleaner.done(complete)


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
