"""Sentences of the docs that claim something was measured or tested, and the programs and tests behind them.

A claim is a sentence with a figure in a unit that is measured, in digits or in words, or with a word such as
"tested". What it rests on is named in the same paragraph or in the heading of its section: a program of
benchmarks/ or tools/ with its figures, or a file of tests/. A table rests on what is named before it.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NUMBERS = "two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|forty|fifty|sixty"
PARTS = "thirds?|quarters?|fifths?|tenths?"
CLOCK = "(?:millisecond|second|minute|hour)"
FIGURE = re.compile(
    r"\b\d[\d,.]*\s?(?:(?:tokens|rows)/s|minutes?|hours?|seconds?|ms|s|%|[KMGT]i?B)(?![\w/])"
    r"|\b\d+ of \d[\d,]*\b|\b\d+(?:\.\d+)? times\b|\b(?:in|takes?) (?:a few )?(?:minutes|hours|seconds)\b"
    rf"|\b(?:{NUMBERS}|half an?|a few|several) {CLOCK}s?\b"
    rf"|\b(?:within|in|after|takes?) (?:a|an|one) {CLOCK}\b"
    rf"|\b(?:half|{PARTS}) (?:of )?(?:the|a|an|that|its) (?:time|speed|size|memory|peak|{CLOCK})\b"
    rf"|\bby (?:half|a (?:{PARTS}))\b|\ba (?:{PARTS}) to (?:a )?(?:half|{PARTS})\b"
    r"|\b(?:much|far|twice as|times as) (?:slow|fast|small|larg)(?:er)?\b"
)
WORDS = re.compile(r"\b(?:tested|measured|bit for bit)\b")
# what was not done needs no program
DENIED = re.compile(r"\b(?:not|nothing|no|never|cannot be)\b[^.;]*\b(?:tested|measured)\b", re.IGNORECASE)
SOURCE = re.compile(r"\b(?:benchmarks|tests|tools)/[\w/]+\.py\b")
CODE = re.compile(r"`[a-z]\w*(?:\.\w+)+`|`[\w/]+\.py`")
RESULT = re.compile(r"(?m)^\||\d GiB RAM")
SENTENCE = re.compile(r"(?<=[.:;])\s+(?=[A-Z*`(-])|\n(?=[|-])")
MESSAGE = re.compile(r"\b\d[\d,.]*\s?(?:minutes?|hours?|[KMGT]i?B)\b|\bin minutes\b|\ba few minutes\b")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, and the files that it rests on."""

    page: str
    sentence: str
    sources: tuple[str, ...]


def of_page(name: str, text: str, has_code: bool = False) -> Iterator[Claim]:
    """The claims of a Markdown text.

    A table, a line that describes the machine, what stands directly behind them, and what a colon announces
    rest on the sources that were named before them. has_code: names of our code count as well, since the
    figures are constants of it.
    """
    sources: list[str] = []
    of_heading: list[str] = []
    belongs = False  # the next paragraph to the sources of this one
    for paragraph in re.split(r"\n\s*\n", FENCE.sub("", text)):
        named = SOURCE.findall(paragraph) + (CODE.findall(paragraph) if has_code else [])
        is_result = bool(RESULT.search(paragraph))
        if paragraph.lstrip().startswith("#"):
            belongs, of_heading = False, named
        if not (is_result or belongs):
            sources = of_heading
        sources, belongs = [*sources, *named], is_result or paragraph.rstrip().endswith(":")
        for sentence in (" ".join(sentence.split()) for sentence in SENTENCE.split(paragraph)):
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
        claim for name, text in pages() for claim in of_page(name, text, has_code=name == "docs/decisions.md")
    ]


def promised_durations(path: Path) -> list[str]:
    """Lines of a script's comments and messages that say how long something takes or how large it is."""
    lines = path.read_text(encoding="utf-8").splitlines()
    spoken = [line for line in lines if line.lstrip().startswith(("#", "echo", "say(", "print("))]
    return [line for line in spoken if MESSAGE.search(line)]
