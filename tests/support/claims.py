"""Sentences of the docs that claim something was measured or tested, and the programs and tests behind them.

A claim is a sentence with a figure in a unit that is measured, or with a word such as "tested". What it rests
on is named in the same section: a program of benchmarks/ or tools/ with its figures, or a file of tests/.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
FIGURE = re.compile(
    r"\b\d[\d,.]*\s?(?:(?:tokens|rows)/s|minutes?|hours?|seconds?|ms|s|%|[KMGT]i?B)(?![\w/])"
    r"|\b\d+ of \d[\d,]*\b|\b\d+(?:\.\d+)? times\b|\b(?:in|takes?) (?:a few )?(?:minutes|hours|seconds)\b"
)
WORDS = re.compile(r"\b(?:tested|measured|bit for bit)\b")
# what was not done needs no program
DENIED = re.compile(r"\b(?:not|nothing|no|never|cannot be)\b[^.;]*\b(?:tested|measured)\b", re.IGNORECASE)
SOURCE = re.compile(r"\b(?:benchmarks|tests|tools)/[\w/]+\.py\b")
CODE = re.compile(r"`[a-z]\w*(?:\.\w+)+`|`[\w/]+\.py`")
SENTENCE = re.compile(r"(?<=[.:;])\s+(?=[A-Z*`(-])|\n(?=[|-])")
MESSAGE = re.compile(r"\b\d[\d,.]*\s?(?:minutes?|hours?|[KMGT]i?B)\b|\bin minutes\b|\ba few minutes\b")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, and the files that its section names."""

    page: str
    sentence: str
    sources: tuple[str, ...]


def of_page(name: str, text: str, is_by_paragraph: bool = False) -> Iterator[Claim]:
    """The claims of a Markdown text.

    is_by_paragraph: each paragraph stands for itself, and names of our code count as well, since the figures
    there are constants of it.
    """
    text = FENCE.sub("", text)
    sections = re.split(r"\n\s*\n" if is_by_paragraph else r"(?m)^(?=#+ )", text)
    for section in sections:
        sources = SOURCE.findall(section) + (CODE.findall(section) if is_by_paragraph else [])
        for sentence in (" ".join(sentence.split()) for sentence in SENTENCE.split(section)):
            if FIGURE.search(sentence) or (WORDS.search(sentence) and not DENIED.search(sentence)):
                yield Claim(name, sentence, tuple(dict.fromkeys(sources)))


def pages() -> Iterator[tuple[str, str]]:
    """Name and text of every page: README.md, docs/, and the texts of the notebooks."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        if path.name != "options.md":  # it is printed from the declarations
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells):
            if cell["cell_type"] == "markdown":
                yield f"notebooks/{path.name}, cell {number}", "".join(cell["source"])


def of_project() -> list[Claim]:
    """The claims of all pages."""
    return [
        claim
        for name, text in pages()
        for claim in of_page(name, text, is_by_paragraph=name == "docs/decisions.md")
    ]


def promised_durations(path: Path) -> list[str]:
    """Lines of a script's comments and messages that say how long something takes or how large it is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    spoken = [line for line in lines if line.lstrip().startswith(("#", "echo", "say(", "print("))]
    return [line for line in spoken if MESSAGE.search(line)]
