"""The rows of a run as token ids. They are read and encoded once and then kept in the user's cache.

The key of an entry is the hash of all that it depends on: the contents of the files, the tokenizer, the
templates and the options that change the encoding. If any of them changes, so does the key: nothing stale is
used.
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

from onecard.config.declaration import row_options
from onecard.config.training import FinetuneConfig
from onecard.data import encode as data_encode
from onecard.data import examples as data_examples
from onecard.data import reader
from onecard.data import schemas as data_schemas
from onecard.data.conversation import Conversation
from onecard.data.markers import UNWRAP, Marked, MarkedRows, Markers
from onecard.data.reader import RowFile
from onecard.data.schemas import BadRow
from onecard.data.template import Template
from onecard.errors import DATA, DISK, UserError
from onecard.system import commands, hashing, lock, whole_folder
from onecard.system import files as system_files

FORMAT = 4  # of an entry in the cache; to be raised when the encoding changes
ROOM = 20 << 30  # bytes that the cache may take
SFT, PRETRAIN = "sft", "pretrain"
DOCUMENTS = ("context", "text")  # roles of text to pre-train on
ENDS, MAKING = "ends.json", ".making-"  # last row of each file, and marked rows; prefix of unfinished entries
ABANDONED = 24 * 3600  # seconds after which nobody works on an unfinished entry any more
CUT = "cut"
CHAT_HERE = "a conversation among raw text: choose --task sft"
RAW_HERE = "raw text among conversations: choose --task sft or pretrain"
LONG_ROW = "Raise --cutoff_len, or say --long_rows cut or drop."
BAD_ROW = (
    "Mend the row, or leave bad rows out with --skip_bad_rows. "
    f"{commands.name('check-data')} lists all of them."
)


@dataclasses.dataclass
class Dataset:
    """The encoded rows of all files of a run."""

    encoding: data_examples.Encoding
    files: list[RowFile]
    ends: np.ndarray  # int64 [number of files], number of the last row of each file
    task: str
    fingerprint: str  # of the files' contents, their order and weights
    folder: Path  # the entry in the cache; it does not exist where the cache cannot be written
    marked: list[MarkedRows]

    @property
    def is_validation(self) -> np.ndarray:
        """bool [N], whether each example comes from a file of --eval_data_path."""
        return np.array([file.validation for file in self.files])[self._file_index()]

    @property
    def weights(self) -> np.ndarray:
        """float [N], the weight of the file that each example comes from."""
        return np.array([file.weight for file in self.files])[self._file_index()]

    def location(self, number: int) -> str:
        """Where the row with this number is, for messages."""
        return data_schemas.location(*_place(self.files, self.ends.tolist(), number), 0)

    def _file_index(self) -> np.ndarray:
        """int64 [N], index of the file that each example begins in."""
        return np.searchsorted(self.ends, self.encoding.examples.numbers)


def _place(files: list[RowFile], ends: list[int], number: int) -> tuple[Path, int]:
    """The file that a row comes from, and the row's number there."""
    index = bisect.bisect_left(ends, number)
    return files[index].path, number - ([0, *ends][index])


def fingerprint_of(files: list[RowFile], again: bool = False) -> str:
    """SHA-256 of the files' contents; of several files, or with a weight, also of their order and weights.

    again: read every file in full, even where its size and time are as they were.
    """
    digests = hashing.of_files([file.path for file in files], again)
    if len(files) == 1 and files[0].weight == 1:
        return digests[files[0].path]
    lines = [f"{digests[file.path]} {file.weight:g} {file.validation}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def encode(
    options: FinetuneConfig,
    files: list[RowFile],
    templates: list[Template],
    tokenizer: Any,
    tokenizer_print: str,
    again: bool = False,
) -> Dataset:
    """Encode all rows of the files, or take them from the cache.

    Of several templates, the seed and the number of a row choose the one that the row is written in.
    tokenizer: from template.tokenizer_for; tokenizer_print: SHA-256 of its files; again: as fingerprint_of
    takes it. Raises UserError: exit 3 at a bad row, without any usable row, or when a file changes meanwhile;
    exit 7 when the rows cannot be written.
    """
    task = options.task if options.task != "auto" else _task(files[0], options.schema)
    content = fingerprint_of(files, again)
    key = cache_key(options, files, templates, tokenizer_print, task, content)
    folder = system_files.cache_folder() / "rows" / key
    with _in_turn(folder):  # of several processes of one run the first encodes; the others use its entry
        encoding, ends, marked = _load_cached(folder, again)
        if encoding is None:
            encoding, ends, marked = _encode_files(
                folder, options, files, templates, tokenizer, task, content
            )
    if not len(encoding.examples):
        problem = (
            f"{options.data_path} has no usable row (rejected: {len(encoding.rejected)}; "
            f"without a target after the cut at {options.cutoff_len} tokens: {encoding.dropped})."
        )
        raise UserError(problem, "Raise --cutoff_len or check the rows.", DATA)
    return Dataset(encoding, files, np.array(ends), task, content, folder, marked)


def cache_key(
    options: FinetuneConfig,
    files: list[RowFile],
    templates: list[Template],
    tokenizer_print: str,
    task: str,
    content: str,
) -> str:
    """SHA-256 of all that encoded rows depend on; content: what fingerprint_of returns for the files."""
    depends = {
        "format": FORMAT,
        "rows": [content, [file.path.suffix for file in files]],
        "tokenizer": tokenizer_print,
        "templates": [template.texts() for template in templates],
        "seed": options.seed if len(templates) > 1 else None,
        "versions": {name: importlib.metadata.version(name) for name in ("tokenizers", "transformers")},
        "as": task,
        **{name: getattr(options, name) for name in row_options(type(options))},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _task(file: RowFile, schema: str | None) -> str:
    """The task that the first good row shows: pre-training for raw text, fine-tuning for all else."""
    for row in reader.read_rows(file.path, schema):
        if isinstance(row, Conversation):
            return PRETRAIN if row.turns[-1].role in DOCUMENTS else SFT
    return SFT


@contextlib.contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Let one process of this machine work on an entry at a time; all of them where there is no cache."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that cannot be written, or a file system without locks
            stack.enter_context(lock.held(system_files.cache_folder() / "locks" / folder.name))
        yield


def _load_cached(
    folder: Path, again: bool = False
) -> tuple[data_examples.Encoding | None, list[int], list[MarkedRows]]:
    """The encoding in an entry of the cache, if it is complete, the last row of each file, and marked rows.

    Marks the entry as used. again: compare the hashes of its files.
    """
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((folder / ENDS).read_text(encoding="utf-8"))
        marked = [MarkedRows(Marked(*marked), rows, first) for marked, rows, first in record["marked"]]
        os.utime(folder)  # _make_room deletes what was used least recently
        return data_examples.load(folder, again), record["ends"], marked
    return None, [], []


def _encode_files(
    folder: Path,
    options: FinetuneConfig,
    files: list[RowFile],
    templates: list[Template],
    tokenizer: Any,
    task: str,
    content: str,
) -> tuple[data_examples.Encoding, list[int], list[MarkedRows]]:
    """Read and encode all rows into the cache. A failure leaves nothing in the cache."""
    markers, unwraps = Markers(templates, tokenizer), options.marked_rows == UNWRAP
    targets = (options.train_on_inputs, options.train_on)
    too_long = f"longer than --cutoff_len {options.cutoff_len}"

    def encode_all(rows: list[Conversation], numbers: list[int]) -> list[data_examples.Encoded | BadRow]:
        chosen = [templates[_choice(options.seed, number, len(templates))] for number in numbers]
        rows = [markers.count(row, number, unwraps) for row, number in zip(rows, numbers, strict=True)]
        limit = options.cutoff_len if task == SFT else sys.maxsize
        encoded = data_encode.encode_many(rows, limit, chosen, tokenizer, *targets)
        if options.long_rows != CUT:
            encoded = [ValueError(too_long) if isinstance(one, tuple) and one[2] else one for one in encoded]
        for index, (row, number) in enumerate(zip(rows, numbers, strict=True)):
            outcome = _misfit(row, task, options.task) or encoded[index]
            if isinstance(outcome, ValueError):
                encoded[index] = rejected(row, number, str(outcome))
        return encoded

    def rejected(row: Conversation, number: int, reason: str) -> BadRow:
        """The bad row for a row that cannot be encoded; raises UserError unless it may be left out."""
        path, number_in_file = _place(files, ends, number)
        bad = BadRow(number_in_file, 0, reason, row.turns[-1].text[:2000], file=str(path))
        left_out = reason == too_long and options.long_rows == "drop"
        # the first row has decided the task, so either kind may be the wrong one: no such row is left out
        mixed = options.task == "auto" and reason in (RAW_HERE, CHAT_HERE)
        if mixed or not (options.skip_bad_rows or left_out):
            fix = {too_long: LONG_ROW, RAW_HERE: "", CHAT_HERE: ""}.get(reason, BAD_ROW)
            raise UserError(f"{bad.describe(path)}.", fix, DATA)
        return bad

    ends: list[int] = []

    def border(number: int) -> bool:
        """Whether a file with another use or weight begins with this row."""
        here, before = (files[bisect.bisect_left(ends, n)] for n in (number, number - 1))
        return number > 1 and (here.validation, here.weight) != (before.validation, before.weight)

    with _workplace(folder) as (temporary, is_cached):
        rows = _read(files, options, ends)
        if task == PRETRAIN:
            length, overlap = options.cutoff_len, options.overlap
            encoding = data_examples.encode_documents(rows, encode_all, length, overlap, border, temporary)
        else:
            encoding = data_examples.encode_rows(rows, encode_all, temporary)
        if fingerprint_of(files) != content:
            problem = f"{options.data_path}: a file changed while it was read."
            raise UserError(problem, "Start again when the file is complete.", DATA)
        marked = list(markers.counted.values())
        texts = [(dataclasses.astuple(rows.marked), rows.rows, rows.first) for rows in marked]
        (temporary / ENDS).write_text(json.dumps({"ends": ends, "marked": texts}), encoding="utf-8")
        if is_cached:
            _keep(temporary, folder)
            encoding = _load_cached(folder)[0] or encoding
    return encoding, ends, marked


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A new folder to write into, and whether it is in the cache. Raises UserError when writing fails.

    A folder in the cache is deleted at the end unless it was moved; files that are mapped stay readable.
    Where the cache cannot be written, the folder is for this run only. It is not whole_folder.stage, which
    needs locks: a cache on a file system without locks is used too.
    """
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary, is_cached = Path(tempfile.mkdtemp(dir=folder.parent, prefix=MAKING)), True
        except OSError:
            temporary, is_cached = Path(tempfile.mkdtemp(prefix="onecard-rows-")), False
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        try:
            yield temporary, is_cached
        finally:
            if is_cached:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        fix = "Free some space, or set ONECARD_CACHE to a folder on another disk."
        problem = f"{folder.parent}: the encoded rows cannot be written: {error.strerror}."
        raise UserError(problem, fix, DISK) from None


def _keep(temporary: Path, folder: Path) -> None:
    """Move a new entry to its place in the cache; replaces a damaged one."""
    if folder.exists() and _load_cached(folder, again=True)[0] is None:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process has put it there
        whole_folder.put(temporary, folder, private=True)  # a file of rows may be private, too
    _make_room(folder)


def _misfit(row: Conversation, task: str, option: str) -> ValueError | None:
    """Why a row does not belong to the task, if so. option: the value of --task."""
    if task == PRETRAIN and not row.is_raw:
        return ValueError(CHAT_HERE)
    if option == "auto" and task == SFT and row.turns[-1].role in DOCUMENTS:
        return ValueError(RAW_HERE)
    return None


def _read(files: list[RowFile], options: FinetuneConfig, ends: list[int]) -> Iterator[Conversation | BadRow]:
    """Read the rows of all files with a progress bar, and append the last row of each file to `ends`."""
    number = 0
    with tqdm(desc="reading rows", unit="row", disable=None) as bar:
        for file in files:
            for row in reader.read_rows(file.path, options.schema):
                if isinstance(row, BadRow) and not options.skip_bad_rows:
                    raise UserError(f"{row.describe(file.path)}.", BAD_ROW, DATA)
                number += 1
                yield dataclasses.replace(row, file=str(file.path)) if isinstance(row, BadRow) else row
                bar.update()
            ends.append(number)


def _choice(seed: int, number: int, count: int) -> int:
    """Which of `count` templates a row is written in: a pure function of seed and number."""
    if count == 1:
        return 0
    return hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest()[0] % count


def _make_room(newest: Path) -> None:
    """Delete the entries that were used least recently, until the cache is small enough."""
    with contextlib.suppress(OSError):
        folders = [folder for folder in newest.parent.iterdir() if folder.is_dir()]
        folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        used = 0
        for folder in folders:
            is_unfinished = folder.name.startswith(MAKING)
            used += sum(file.stat().st_size for file in folder.iterdir())
            is_abandoned = is_unfinished and time.time() - folder.stat().st_mtime > ABANDONED
            if is_abandoned or (used > ROOM and folder != newest and not is_unfinished):
                shutil.rmtree(folder, ignore_errors=True)
