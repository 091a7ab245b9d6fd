"""The rows of one run: encoded, split for training and validation, and the held-out prompts among them."""

import contextlib
import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from onecard.config.training import FinetuneConfig
from onecard.data import examples as data_examples
from onecard.data import reader
from onecard.data.conversation import Conversation, Turn
from onecard.data.dataset import SFT, Rows, encode
from onecard.data.reader import Source
from onecard.data.template import Template
from onecard.errors import DATA, UserError
from onecard.system import files as system_files

HELD_OUT_PROMPTS = 8  # at most, of the validation rows


@dataclasses.dataclass
class RunData:
    """The rows of a run: encoded, split, and those that its answers are asked of."""

    sources: list[Source]
    task: str  # sft or pretrain
    encoding: data_examples.Encoding
    fingerprint: str  # of the files' contents, their order and weights
    train_rows: np.ndarray  # places in examples; as often as its weight in an epoch
    validation_rows: np.ndarray  # places in examples
    overlapping: int  # validation rows that are training rows too
    held_out: list[Conversation]  # of the first validation rows; none of raw text

    @property
    def examples(self) -> data_examples.Examples:
        return self.encoding.examples


def prepare(
    options: FinetuneConfig,
    sources: list[Source],
    templates: list[Template],
    tokenizer: Any,
    tokenizer_print: str,
    again: bool = False,
) -> RunData:
    """Read, encode and split the rows of a run; raises UserError (exit 3).

    tokenizer_print: SHA-256 of the tokenizer's files; again: read all rows anew.
    """
    rows = encode(options, sources, templates, tokenizer, tokenizer_print, again)
    train_rows, validation_rows = split_for_validation(options, rows)
    hashes = rows.encoding.examples.hashes
    asked = validation_rows[:HELD_OUT_PROMPTS] if rows.task == SFT else validation_rows[:0]
    return RunData(
        sources=sources,
        task=rows.task,
        encoding=rows.encoding,
        fingerprint=rows.fingerprint,
        train_rows=train_rows,
        validation_rows=validation_rows,
        overlapping=int(np.isin(hashes[validation_rows], hashes[train_rows]).sum()),
        held_out=picked(rows, asked, options.schema),
    )


def picked(rows: Rows, places: np.ndarray, schema: str | None) -> list[Conversation]:
    """The conversations of these examples: read again once, then kept beside the encoded rows."""
    numbers = rows.encoding.examples.numbers[places].tolist()
    if not numbers:
        return []
    name = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]
    place = rows.folder / f"picked-{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        kept = json.loads(place.read_text(encoding="utf-8"))
        return [Conversation(tuple(Turn(*turn) for turn in turns)) for turns in kept]
    found = reader.pick_rows([source.path for source in rows.sources], numbers, schema)
    with contextlib.suppress(OSError):
        system_files.write_json(place, [row.turns for row in found])
    return found


def split_for_validation(options: FinetuneConfig, found: Rows) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) places: from files of their own, or by --test_size; weights are training's."""
    apart = found.for_validation
    ours, validation = np.flatnonzero(~apart), np.flatnonzero(apart)
    if not options.eval_data_path:
        chosen, held = data_examples.split(len(ours), options.test_size, options.seed)
        ours, validation = ours[chosen], ours[held]
    elif not len(ours) or not len(validation):
        which = "--eval_data_path" if len(ours) else "--data_path"
        raise UserError(f"{which}: no usable row is in it.", "Raise --cutoff_len or check the rows.", DATA)
    training = data_examples.repeated(ours, found.weights[ours], options.seed)
    if not len(training):
        raise UserError(f"--data_path {options.data_path}: no row is left.", "Raise the weights.", DATA)
    return training, validation
