"""Checks rows before they are trained on: what a file holds, what it costs, and what should not be in it.

Every row is read once, and the file is not changed. `Cleaner` writes the usable rows to another file, and the
others with the reason to a second one: rows in = rows kept + rows left out.
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

from onecard.config import declaration
from onecard.config.options import flag
from onecard.config.tools import CheckConfig
from onecard.data import encode as data_encode
from onecard.data import markers as data_markers
from onecard.data import reader
from onecard.data import schemas as data_schemas
from onecard.data import template as data_template
from onecard.data.conversation import ASSISTANT, TARGETS, Conversation
from onecard.data.findings import Findings, RowReport, plot_lengths, report, write_html
from onecard.data.schemas import BadRow
from onecard.data.template import Template
from onecard.errors import UserError
from onecard.system import files as system_files
from onecard.system.console import say

MARKERS = {  # kind of a row with a template's markers -> the problem, by the template's name
    data_markers.WHOLE: "questions within the markers of {}, which training takes off",
    data_markers.TURNS: "conversations within the markers of {}, of which training makes turns",
    data_markers.PART: "markers of {} in a question, but the question is not a whole prompt of it",
    data_markers.TEXT: "raw text with markers of {}: training learns its questions too",
}
PLACEHOLDERS = re.compile(
    r"<一段文[本字]>|<文本>|\[图[画片]\]|<no ?(in|out)put>|<image>|\[image\]|\[insert [^\]]*\]",
    re.IGNORECASE,
)
# without the joiners U+200C and U+200D, which words and emoji need
INVISIBLE = re.compile(
    "[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\ufeff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
CONTROL = re.compile(r"<\|[a-z_]{2,20}\|>|</?s>|\[/?INST\]|<<SYS>>")  # of the models people train most
SHOWN = 20  # rows in the HTML report
UNUSABLE = {  # problem for which --clean leaves a row out -> the reason it gives
    "unreadable": "cannot be used",
    "duplicates": "the same as an earlier row",
    "empty outputs": "an answer is empty",
    "without targets": "no token of an answer is left after the cut",
    "placeholders": "holds placeholder text",
}


def check_options(options: CheckConfig) -> None:
    """Raise UserError for options that contradict each other, before anything is fetched."""
    if options.repair and not options.clean:
        raise UserError(
            "--repair only works with --clean: it repairs the rows that --clean writes.",
            "Add --clean FILE.jsonl.",
        )
    data_template.check(options.template)


def run(options: CheckConfig, paths: list[Path], tokenizer: Any) -> None:
    """Check all rows of these files, print the report, and write the files that the options name.

    Raises UserError when a file cannot be read or written, or the template does not fit the tokenizer.
    """
    template = data_template.load(options.template, tokenizer)
    tokenizer = data_template.tokenizer_for(tokenizer, template)
    _check_targets(options, paths)
    findings, targets = Findings(), (options.train_on_inputs, options.train_on)
    rows = examine(findings, paths, options.schema, template, tokenizer, options.cutoff_len, *targets)
    cleaner = Cleaner(Path(options.clean), options.repair) if options.clean else None
    read_all(rows, cleaner)
    text = report(findings, options.cutoff_len)
    say(text)
    if cleaner:
        clean_file, dropped_file = cleaner.targets
        say(f"\n{cleaner.kept} rows were written to {clean_file}.")
        say(f"{cleaner.left_out} rows were left out; they are in {dropped_file} with the reasons.")
    if options.png and findings.lengths:
        plot_lengths(findings.lengths, options.cutoff_len, Path(options.png))
        say(f"The histogram is in {options.png}.")
    if options.html:
        write_html(findings, f"Rows of {options.data_path}", text, Path(options.html))
        say(f"The report is in {options.html}; open it in a browser.")


def _check_targets(options: CheckConfig, paths: list[Path]) -> None:
    """Raise UserError when a file to write is also read or written for something else, or has no folder."""
    taken = {path.resolve() for path in paths}
    targets = [("clean", target) for target in outputs(Path(options.clean))] if options.clean else []
    files = declaration.names(type(options), lambda option: option.is_written)
    targets += [(name, Path(getattr(options, name))) for name in files if getattr(options, name)]
    for name, target in targets:
        if target.resolve() in taken:
            problem = (
                f"{flag(options, name)} {target} is one of the files that are read, or is written already."
            )
            raise UserError(problem, "Name another file.")
        if not target.absolute().parent.is_dir():
            raise UserError(
                f"{flag(options, name)} {target}: its folder does not exist.",
                "Create the folder, or name another file.",
            )
        taken.add(target.resolve())


def examine(
    findings: Findings,
    paths: list[Path],
    schema: str | None,
    template: Template,
    tokenizer: Any,
    cutoff_len: int,
    *targets: Any,
) -> Iterator[RowReport]:
    """Check every row, one at a time, and count in `findings` what is in it.

    tokenizer: from template.tokenizer_for; targets: train_on_inputs and train_on, as encode takes them.
    """
    digests: set[bytes] = set()  # of the rows before
    markers = data_markers.Markers([template], tokenizer)
    control = re.compile("|".join([CONTROL.pattern, *map(re.escape, tokenizer.all_special_tokens)]))
    for path in paths:
        for line, column, value, text in reader.values(path):
            findings.read += 1
            row = RowReport(data_schemas.location(path, line, column), value, [])
            conversation = reader.conversation(line, column, value, text, schema)
            if isinstance(conversation, BadRow):
                row.value, row.reason = conversation.text.strip(), conversation.reason
                row.problems.append("unreadable")
            else:
                conversation, marked = markers.unwrap(conversation)
                if marked:
                    row.problems.append(MARKERS[marked.kind].format(marked.template))
                _find_problems(conversation, row, control, digests)
                _measure(conversation, findings, row, template, tokenizer, cutoff_len, targets)
                findings.schemas[schema or data_schemas.recognise(value)] += 1
                findings.turns[sum(turn.role == ASSISTANT for turn in conversation.turns)] += 1
            for problem in row.problems:
                findings.problems[problem] += 1
                findings.examples.setdefault(
                    problem, row.location + (f" ({row.reason})" if row.reason else "")
                )
            yield row


def _find_problems(
    conversation: Conversation, row: RowReport, control: re.Pattern, digests: set[bytes]
) -> None:
    """Note the problems that the texts of a conversation show, and add its digest."""
    from ftfy import badness

    texts = [text for turn in conversation.turns for text in (turn.text, turn.input) if text]
    fields = [INVISIBLE.sub("", field) for turn in conversation.turns for field in turn]
    whole = "\0".join(fields)
    digest = hashlib.blake2b(whole.encode(), digest_size=16).digest()
    questions = [turn for turn in conversation.turns if turn.role == "user"]
    pairs = zip(conversation.turns, conversation.turns[1:], strict=False)
    checks = {
        "duplicates": digest in digests,
        "empty outputs": any(
            not INVISIBLE.sub("", turn.text).strip() for turn in conversation.turns if turn.role in TARGETS
        ),
        "instruction equal to input": any(
            turn.input and turn.text.strip() == turn.input.strip() for turn in questions
        ),
        "answer equal to question": any(
            turn.role == ASSISTANT and before.text.strip() == turn.text.strip() for before, turn in pairs
        ),
        "placeholders": any(PLACEHOLDERS.search(text) for text in texts),
        "invisible characters": any(INVISIBLE.search(text) for text in texts),
        "mojibake": any(badness.is_bad(text) for text in texts),
        "control tokens": any(control.search(text) for text in texts),
    }
    digests.add(digest)
    row.problems += [name for name, has_problem in checks.items() if has_problem]


def _measure(
    conversation: Conversation,
    findings: Findings,
    row: RowReport,
    template: Template,
    tokenizer: Any,
    cutoff_len: int,
    targets: tuple,
) -> None:
    """Count the tokens of a row; note when the template cannot write it or no target is left."""
    try:
        encoded = data_encode.encode(conversation, template, tokenizer, *targets)
        is_text = conversation.turns[-1].role == "text"  # it is cut into blocks, and nothing is lost
        limit = sys.maxsize if is_text else cutoff_len
        cut, is_target, was_cut = data_encode.shortened(
            conversation, encoded, limit, template, tokenizer, *targets
        )
    except ValueError as error:
        row.problems.append("unreadable")
        row.reason = str(error)
        return
    findings.lengths.append(len(encoded[0]))
    findings.cut += was_cut
    if not any(is_target):
        row.problems.append("without targets")
        return
    findings.cut_lengths.append(len(cut))
    findings.targets += sum(is_target)
    if len(findings.shown) < SHOWN:
        findings.shown.append((row.location, data_encode.runs(tokenizer, cut, is_target)))


def clean(value: Any, repair: bool) -> Any:
    """A row's value without invisible characters in any text; repair: also without mojibake."""
    if isinstance(value, str):
        if repair:
            import ftfy

            value = ftfy.fix_encoding(value)
        return INVISIBLE.sub("", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON cannot write it
    if isinstance(value, list):
        return [clean(item, repair) for item in value]
    if isinstance(value, dict):
        return {key: clean(item, repair) for key, item in value.items()}
    return value


def outputs(path: Path) -> tuple[Path, Path]:
    """The two files that a Cleaner writes: the rows that are kept, and those that are left out."""
    return path, path.with_name(f"{path.stem}.dropped.jsonl")


class Cleaner:
    """Writes usable rows to `path`, and the others with the reason to `<path>.dropped.jsonl`."""

    def __init__(self, path: Path, repair: bool):
        self.repair, self.kept, self.left_out = repair, 0, 0
        self.targets = outputs(path)
        self.temporary = [target.with_name(f".{target.name}.tmp") for target in self.targets]
        self.files = [open(path, "w", encoding="utf-8") for path in self.temporary]  # noqa: SIM115

    def add(self, row: RowReport) -> None:
        """Write a row to the file that it belongs to."""
        reasons = [UNUSABLE[name] for name in row.problems if name in UNUSABLE]
        try:
            cleaned = clean(row.value, self.repair)
        except RecursionError:
            reasons.append("nested too deeply")
        if reasons:
            self.left_out += 1
            record = {"where": row.location, "why": [row.reason] if row.reason else reasons, "row": row.value}
        else:
            self.kept += 1
            record = cleaned
        text = json.dumps(record, ensure_ascii=False, default=str) + "\n"
        self.files[bool(reasons)].write(text.encode("utf-8", "backslashreplace").decode())

    def close(self, complete: bool) -> None:
        """Move both files to their places, or delete them when not all rows were read.

        Raises UserError (exit 7) when the disk is full, and deletes them then too.
        """
        try:
            for file in self.files:
                file.close()
            if complete:
                for temporary, target in zip(self.temporary, self.targets, strict=True):
                    system_files.put_file(temporary, target)
        except OSError as error:
            raise system_files.disk_error(self.targets[0], error) from None
        finally:
            for temporary in self.temporary:
                temporary.unlink(missing_ok=True)


def read_all(rows: Iterator[RowReport], cleaner: Cleaner | None) -> None:
    """Read all rows with a progress bar, and let the cleaner write them."""
    complete = False
    try:
        for row in tqdm(rows, desc="checking rows", unit="row", disable=None):
            if cleaner:
                cleaner.add(row)
        complete = True
    except OSError as error:
        if cleaner and error.errno in system_files.REFUSED:
            raise system_files.disk_error(cleaner.targets[0], error) from None
        raise
    finally:
        if cleaner:
            cleaner.close(complete)
