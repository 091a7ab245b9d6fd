"""The published texts by which quantised models are usually calibrated: WikiText-2, C4 and the Penn Treebank.

As in the code of GPTQ (Frantar et al. 2022, arXiv 2210.17323), a calibration row is a random window of the
training text. WikiText-2 and the Penn Treebank are one long text each; of C4 every window lies inside of one
document. The text comes from a local file or folder in the layout in which it was published, or from the hub.
"""

import dataclasses
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from onecard.config.conversion import C4, PTB, WIKITEXT2
from onecard.data import tables
from onecard.errors import DATA, UserError, first_line
from onecard.hub import locate

FLAG = "--calibration_path"
CANDIDATES = 64  # documents of C4 that are kept for each row: most are shorter than a row
TEXT, SENTENCE = "text", "sentence"  # keys of the documents in Parquet and JSON files


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A published text. between: what stands between two of its parts; None: a window lies in one part."""

    title: str
    repository: str  # on the hub, perhaps with a revision
    remote: str  # the files that are fetched from there
    local: tuple[str, ...]  # patterns of the files in a folder; the first that fits something counts
    key: str
    between: str | None
    read_line: Callable[[str], str]  # a line of a plain text file -> a part of the text


def _wiki_line(line: str) -> str:
    """As in the Parquet file of WikiText-2: lines keep their end, and blank ones are empty."""
    return line if line.strip() else ""


CORPORA = {
    WIKITEXT2: Corpus(
        "WikiText-2",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/train-*.parquet",
        ("**/wikitext-2-raw-v1/train-*.parquet", "train-*.parquet", "**/wiki.train.raw"),
        TEXT,
        "\n\n",
        _wiki_line,
    ),
    C4: Corpus(
        "C4",
        "allenai/c4",
        "en/c4-train.00000-of-01024.json.gz",
        ("**/en/c4-train.*.json.gz", "**/c4-train.*.json.gz", "**/c4-train.*.json"),
        TEXT,
        None,
        str.strip,
    ),
    PTB: Corpus(
        "Penn Treebank",
        "ptb-text-only/ptb_text_only@refs/convert/parquet",
        "penn_treebank/train/*.parquet",
        ("**/ptb.train.txt", "**/penn_treebank/train/*.parquet", "**/ptb_text_only-train*.parquet"),
        SENTENCE,
        " ",
        str.strip,
    ),
}


def file_of(name: str, path: str | None) -> Path:
    """The file with the training text of a corpus; path: --calibration_path, or None to ask the hub.

    Raises UserError: exit 3 when the file or folder does not hold the text, 2 when the hub gives none.
    """
    corpus = CORPORA[name]
    if path is None:
        fix = f"Check the network, or name the file with {FLAG}: see docs/tools.md."
        return _in_folder(Path(locate.fetch_text(corpus.repository, corpus.remote, fix)), corpus)
    place = Path(path)
    if place.is_dir():
        return _in_folder(place, corpus)
    if not place.is_file():
        raise UserError(f"{FLAG} {path}: no such file or folder.", _expected(corpus), DATA)
    return place


def _in_folder(folder: Path, corpus: Corpus) -> Path:
    for pattern in corpus.local:
        matches = sorted(path for path in folder.glob(pattern) if path.is_file())
        if matches:
            return matches[0]
    raise UserError(f"{folder}: there is no training text of {corpus.title}.", _expected(corpus), DATA)


def _expected(corpus: Corpus) -> str:
    names = " or ".join(pattern.removeprefix("**/") for pattern in corpus.local)
    return f"With {FLAG}, name a file of {corpus.title} as it is published, or a folder with {names}."


def windows(
    name: str, file: Path, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """`count` windows of `length` token ids each, from random places of the text; the seed decides which.

    Of C4 there may be fewer. Raises UserError (exit 3) when the file cannot be read or is too short.
    """
    corpus, chance = CORPORA[name], random.Random(seed)
    if corpus.between is None:
        texts: Iterator[str] = iter(_some(parts(file, corpus), CANDIDATES * count, chance))
    else:
        texts = iter([corpus.between.join(parts(file, corpus))])
    rows: list[list[int]] = []
    for text in texts:
        if len(rows) == count:
            break
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        while len(ids) > length and len(rows) < count:
            start = chance.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
            if corpus.between is None:
                break  # one window of a document
    if not rows:
        part = "the text" if corpus.between is not None else "none of the documents"
        verb = "is not" if corpus.between is not None else "is"
        problem = f"{file}: {part} {verb} longer than {length} tokens."
        raise UserError(problem, "Use a smaller --cutoff_len, or another file.", DATA)
    return rows


def _some(texts: Iterator[str], most: int, chance: random.Random) -> list[str]:
    """At most `most` of the texts, each of them equally probable, in random order (reservoir sampling)."""
    chosen: list[str] = []
    for number, text in enumerate(texts):
        if number < most:
            chosen.append(text)
        elif (place := chance.randint(0, number)) < most:
            chosen[place] = text
    chance.shuffle(chosen)
    return chosen


def parts(file: Path, corpus: Corpus) -> Iterator[str]:
    """The lines, sentences or documents of a file; raises UserError (exit 3) naming what cannot be read."""
    try:
        if file.suffix == ".parquet":
            for number, _, value, _ in tables.parquet_values(file):
                yield _field(value, corpus, f"{file}, row {number}")
        elif file.suffix in (".gz", ".json", ".jsonl"):
            with _opened(file) as lines:
                for number, line in enumerate(lines, 1):
                    yield _field(json.loads(line), corpus, f"{file}:{number}")
        else:
            with file.open(encoding="utf-8") as lines:
                yield from map(corpus.read_line, lines)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        problem = f"{file}: cannot be read as a text of {corpus.title}: {first_line(error)}."
        raise UserError(problem, _expected(corpus), DATA) from None


def _opened(file: Path) -> TextIO:
    """A text file, or one that gzip has compressed, to be read."""
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _field(value: Any, corpus: Corpus, where: str) -> str:
    text = value.get(corpus.key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{where}: there is no {corpus.key!r} with a text.", _expected(corpus), DATA)
    return text
