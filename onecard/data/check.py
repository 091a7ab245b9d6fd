"""Looking at rows before they are trained on: what is in a file, what it costs, what should not be in it.

Every row is read once; nothing is changed. `Cleaner` writes what is worth keeping to another file, and beside
it what was left out and why: rows in = rows kept + rows left out.
"""

import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.config.tools import CheckConfig
from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.data import findings, reader
from onecard.data import schemas as data_schemas
from onecard.data import template as templates
from onecard.data.conversation import ASSISTANT, Conversation
from onecard.data.findings import Findings, Row
from onecard.data.schemas import BadRow
from onecard.data.template import Template
from onecard.errors import UserError
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
SHOWN = 20  # rows of the HTML report
UNUSABLE = {  # what `clean` leaves out
    "unreadable": "cannot be used",
    "duplicates": "the same as an earlier row",
    "empty outputs": "an answer is empty",
    "without targets": "no token of an answer is left after the cut",
    "placeholders": "holds placeholder text",
}


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
    tokenizer = templates.tokenizer_for(tokenizer, template)
    _check_targets(options, paths)
    seen, how = Findings(), (options.train_on_inputs, options.train_on)
    rows = examine(seen, paths, options.schema, template, tokenizer, options.cutoff_len, *how)
    cleaner = Cleaner(Path(options.clean), options.repair) if options.clean else None
    all_rows(rows, cleaner)
    text = findings.report(seen, options.cutoff_len)
    say(text)
    if cleaner:
        kept, dropped = cleaner.targets
        say(f"\n{cleaner.kept} rows are in {kept}, {cleaner.left_out} with the reason in {dropped}.")
    if options.png and seen.lengths:
        findings.lengths(seen.lengths, options.cutoff_len, Path(options.png))
        say(f"The histogram is in {options.png}.")
    if options.html:
        findings.write_html(seen, f"Rows of {options.data_path}", text, Path(options.html))
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
