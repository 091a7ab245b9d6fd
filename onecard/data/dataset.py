"""The rows of a run as token ids: read and encoded once, then kept in the user's cache.

What is kept is found again by all that it depends on: the files' contents, the tokenizer, the templates, and
how rows were cut. Any of these changed gives another key, so nothing stale is ever used.
"""

import atexit
import bisect
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from onecard.config.training import HOW, FinetuneConfig
from onecard.data import encode as data_encode
from onecard.data import examples as data_examples
from onecard.data import reader
from onecard.data.conversation import Conversation
from onecard.data.reader import Source
from onecard.data.schemas import BadRow
from onecard.data.template import Template
from onecard.errors import DATA, DISK, UserError
from onecard.system import commands, hashing, lock
from onecard.system import files as system_files

FORMAT = 2  # of what is kept; the next number when encoding changes
ROOM = 20 << 30  # bytes of the cache
SFT, PRETRAIN = "sft", "pretrain"
DOCUMENTS = ("context", "text")  # roles that are pre-trained on
ENDS, MAKING = "ends.json", ".making-"
ABANDONED = 24 * 3600  # seconds after which nobody works on it any more
CUT = "cut"
CHAT_HERE = "a conversation among raw text: choose --task sft"
RAW_HERE = "raw text among conversations: choose --task sft or pretrain"
LONG_ROW = "Raise --cutoff_len, or say --long_rows cut or drop."
BAD_ROW = (
    "Mend the row, or leave bad rows out with --skip_bad_rows. "
    f"{commands.name('check-data')} lists all of them."
)


@dataclasses.dataclass
class Rows:
    """The encoded rows of all files of a run."""

    encoding: data_examples.Encoding
    sources: list[Source]
    ends: np.ndarray  # int64 [sources], number of the last row of each file
    task: str
    fingerprint: str  # of the files' contents, their order and weights
    folder: Path  # in the cache, if it could be kept

    @property
    def for_validation(self) -> np.ndarray:
        """Whether each example comes from a file of --eval_data_path, bool [N]."""
        return np.array([source.validation for source in self.sources])[self._source()]

    @property
    def weights(self) -> np.ndarray:  # float [N]
        return np.array([source.weight for source in self.sources])[self._source()]

    def _source(self) -> np.ndarray:
        """Which file each example begins in, int [N]."""
        return np.searchsorted(self.ends, self.encoding.examples.numbers)


def fingerprint_of(sources: list[Source], again: bool = False) -> str:
    """SHA-256 of the files' contents, and of their order and weights where there are several."""
    digests = hashing.of_files([source.path for source in sources], again)
    if len(sources) == 1 and sources[0].weight == 1:
        return digests[sources[0].path]
    lines = [f"{digests[source.path]} {source.weight:g} {source.validation}\n" for source in sources]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def encode(
    options: FinetuneConfig,
    sources: list[Source],
    templates: list[Template],
    tokenizer: Any,
    tokenizer_print: str,
    again: bool = False,
) -> Rows:
    """Encode all rows, or take them from the cache; raises UserError (exit 3) at a bad row or without any.

    Of several templates each row has the one that the seed and its number choose.
    """
    task = options.task if options.task != "auto" else _task(sources[0], options.schema)
    content = fingerprint_of(sources, again)
    depends = {
        "format": FORMAT,
        "rows": [content, [source.path.suffix for source in sources]],
        "tokenizer": tokenizer_print,
        "templates": [template.texts() for template in templates],
        "seed": options.seed if len(templates) > 1 else None,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
        "as": task,
        **{name: getattr(options, name) for name in HOW},
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    folder = system_files.cache_folder() / "rows" / key
    with _in_turn(folder):  # several processes of one run: the first encodes, the others find it done
        kept, ends = _kept(folder, again)
        if kept is None:
            kept, ends = _make(folder, options, sources, templates, tokenizer, task, content)
    if not len(kept.examples):
        problem = (
            f"{options.data_path}: no usable row: {len(kept.rejected)} rejected, "
            f"{kept.dropped} with no target left after the cut at {options.cutoff_len} tokens."
        )
        raise UserError(problem, "Raise --cutoff_len or check the rows.", DATA)
    return Rows(kept, sources, np.array(ends), task, content, folder)


def _task(source: Source, schema: str | None) -> str:
    """Raw text is pre-trained on, everything else is fine-tuned on: the first good row tells."""
    for row in reader.read_rows(source.path, schema):
        if isinstance(row, Conversation):
            return PRETRAIN if row.turns[-1].role in DOCUMENTS else SFT
    return SFT


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """One process of this machine at a time; without a cache to write into all at once."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written, or a file system without locks
            stack.enter_context(lock.held(system_files.cache_folder() / "locks" / folder.name))
        yield


def _kept(folder: Path, again: bool = False) -> tuple[data_examples.Encoding | None, list[int]]:
    with contextlib.suppress(OSError, ValueError):
        ends = json.loads((folder / ENDS).read_text(encoding="utf-8"))
        os.utime(folder)  # the last to be thrown out
        return data_examples.load(folder, again), ends
    return None, []


def _make(
    folder: Path,
    options: FinetuneConfig,
    sources: list[Source],
    templates: list[Template],
    tokenizer: Any,
    task: str,
    content: str,
) -> tuple[data_examples.Encoding, list[int]]:
    """Read and encode all rows into the cache; what is half done when it fails is deleted."""
    how = (options.train_on_inputs, options.train_on)
    too_long = f"longer than --cutoff_len {options.cutoff_len}"

    def encode_all(found: list[Conversation], numbers: list[int]) -> list[data_examples.Encoded | BadRow]:
        chosen = [templates[_choice(options.seed, number, len(templates))] for number in numbers]
        limit = options.cutoff_len if task == SFT else sys.maxsize
        made = data_encode.encode_many(found, limit, chosen, tokenizer, *how)
        if options.long_rows != CUT:
            made = [ValueError(too_long) if isinstance(one, tuple) and one[2] else one for one in made]
        for place, (row, number) in enumerate(zip(found, numbers, strict=True)):
            wrong = _misfit(row, task, options.task) or made[place]
            if isinstance(wrong, ValueError):
                made[place] = rejected(row, number, str(wrong))
        return made

    def rejected(row: Conversation, number: int, reason: str) -> BadRow:
        """A row that only its encoding showed; raises UserError unless it may be left out."""
        file = bisect.bisect_left(ends, number)
        path, here = sources[file].path, number - ([0, *ends][file])
        bad = BadRow(here, 0, reason, row.turns[-1].text[:2000], file=str(path))
        left_out = reason == too_long and options.long_rows == "drop"
        mixed = options.task == "auto" and reason in (RAW_HERE, CHAT_HERE)  # which is which hangs on order
        if mixed or not (options.skip_bad_rows or left_out):
            fix = {too_long: LONG_ROW, RAW_HERE: "", CHAT_HERE: ""}.get(reason, BAD_ROW)
            raise UserError(f"{bad.describe(path)}.", fix, DATA)
        return bad

    ends: list[int] = []

    def border(number: int) -> bool:
        """Whether another use begins with this row: validation, or another weight."""
        here, before = (sources[bisect.bisect_left(ends, n)] for n in (number, number - 1))
        return number > 1 and (here.validation, here.weight) != (before.validation, before.weight)

    with _workplace(folder) as (temporary, is_kept):
        found = _read(sources, options, ends)
        if task == PRETRAIN:
            length, overlap = options.cutoff_len, options.overlap
            made = data_examples.encode_documents(found, encode_all, length, overlap, border, temporary)
        else:
            made = data_examples.encode_rows(found, encode_all, temporary)
        if fingerprint_of(sources) != content:
            problem = f"{options.data_path}: changed while it was read."
            raise UserError(problem, "Start again when it is complete.", DATA)
        (temporary / ENDS).write_text(json.dumps(ends), encoding="utf-8")
        if is_kept:
            _keep(temporary, folder)
            made = _kept(folder)[0] or made
    return made, ends


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A new folder to write into, and whether it is one of the cache; raises UserError where writing fails.

    One of the cache goes at the end, unless it was moved; what is mapped from it stays readable. Where the
    cache cannot be written, it is a folder for this run only.
    """
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary, is_kept = Path(tempfile.mkdtemp(dir=folder.parent, prefix=MAKING)), True
        except OSError:
            temporary, is_kept = Path(tempfile.mkdtemp(prefix="onecard-rows-")), False
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        try:
            yield temporary, is_kept
        finally:
            if is_kept:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        fix = "Make room, or set ONECARD_CACHE to a folder elsewhere."
        raise UserError(f"{folder.parent}: encoded rows: {error.strerror}.", fix, DISK) from None


def _keep(temporary: Path, folder: Path) -> None:
    """Move what was made to its place in the cache, instead of a damaged one."""
    if folder.exists() and _kept(folder, again=True)[0] is None:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process was faster
        temporary.rename(folder)
    _make_room(folder)


def _misfit(row: Conversation, task: str, asked: str) -> ValueError | None:
    """What is wrong with a row of the other kind."""
    if task == PRETRAIN and not row.is_raw:
        return ValueError(CHAT_HERE)
    if asked == "auto" and task == SFT and row.turns[-1].role in DOCUMENTS:
        return ValueError(RAW_HERE)
    return None


def _read(sources: list[Source], options: FinetuneConfig, ends: list[int]) -> Iterator[Conversation | BadRow]:
    """The rows of all files with a bar; notes in `ends` the number of each file's last row."""
    number = 0
    with tqdm(desc="reading rows", unit="row", disable=None) as bar:
        for source in sources:
            for row in reader.read_rows(source.path, options.schema):
                if isinstance(row, BadRow) and not options.skip_bad_rows:
                    raise UserError(f"{row.describe(source.path)}.", BAD_ROW, DATA)
                number += 1
                yield dataclasses.replace(row, file=str(source.path)) if isinstance(row, BadRow) else row
                bar.update()
            ends.append(number)


def _choice(seed: int, number: int, count: int) -> int:
    """Which of `count` templates a row has: a pure function of seed and number."""
    if count == 1:
        return 0
    return hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()[0] % count


def _make_room(newest: Path) -> None:
    """Throw out what was not used for longest, until the cache is small enough again."""
    with contextlib.suppress(OSError):
        folders = [folder for folder in newest.parent.iterdir() if folder.is_dir()]
        folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        used = 0
        for folder in folders:
            making = folder.name.startswith(MAKING)
            used += sum(file.stat().st_size for file in folder.iterdir())
            abandoned = making and time.time() - folder.stat().st_mtime > ABANDONED
            if abandoned or (used > ROOM and folder != newest and not making):
                shutil.rmtree(folder, ignore_errors=True)
