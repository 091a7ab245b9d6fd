"""The rows of one run: encoded, split for training and validation, and the validation prompts among them."""

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
from onecard.data.dataset import SFT, Dataset, encode
from onecard.data.markers import UNWRAP, MarkedRows, Markers
from onecard.data.reader import RowFile
from onecard.data.template import Template
from onecard.errors import DATA, UserError
from onecard.system import files as system_files

VALIDATION_PROMPTS = 8  # at most so many of the validation rows are answered


@dataclasses.dataclass
class RunData:
    """The rows of a run: encoded and split; and the prompts that it answers before and after training."""

    files: list[RowFile]
    task: str  # sft or pretrain
    encoding: data_examples.Encoding
    fingerprint: str  # of the files' contents, their order and weights
    train_rows: np.ndarray  # int64, indices in examples, each as often as its weight says
    validation_rows: np.ndarray  # int64, indices in examples
    overlapping: int  # number of validation rows whose ids are also those of a training row
    validation_prompts: list[Conversation]  # the first validation rows with their answers; none of raw text
    marked: list[tuple[MarkedRows, str]]  # with the location of the first of these rows

    @property
    def examples(self) -> data_examples.Examples:
        """The encoded rows."""
        return self.encoding.examples


def prepare(
    options: FinetuneConfig,
    files: list[RowFile],
    templates: list[Template],
    tokenizer: Any,
    tokenizer_print: str,
    again: bool = False,
) -> RunData:
    """Read, encode and split the rows of a run.

    tokenizer: from template.tokenizer_for; tokenizer_print: SHA-256 of the tokenizer's files; again: read
    every file in full, even where its size and time are as they were. Raises UserError (exit 3) when a row
    cannot be used, or when no row is left to train on or to validate with.
    """
    dataset = encode(options, files, templates, tokenizer, tokenizer_print, again)
    train_rows, validation_rows = split_for_validation(options, dataset)
    hashes = dataset.encoding.examples.hashes
    prompts = validation_rows[:VALIDATION_PROMPTS] if dataset.task == SFT else validation_rows[:0]
    validation_prompts = read_conversations(dataset, prompts, options.schema)
    if options.marked_rows == UNWRAP:
        markers = Markers(templates, tokenizer)
        validation_prompts = [markers.unwrap(row)[0] for row in validation_prompts]
    return RunData(
        files=files,
        task=dataset.task,
        encoding=dataset.encoding,
        fingerprint=dataset.fingerprint,
        train_rows=train_rows,
        validation_rows=validation_rows,
        overlapping=int(np.isin(hashes[validation_rows], hashes[train_rows]).sum()),
        validation_prompts=validation_prompts,
        marked=[(rows, dataset.location(rows.first)) for rows in dataset.marked],
    )


def read_conversations(dataset: Dataset, indices: np.ndarray, schema: str | None) -> list[Conversation]:
    """The conversations of these examples. They are read from the files once, then from beside the ids."""
    numbers = dataset.encoding.examples.numbers[indices].tolist()
    if not numbers:
        return []
    name = hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]
    cached = dataset.folder / f"picked-{name}.json"
    with contextlib.suppress(OSError, ValueError, TypeError):
        rows = json.loads(cached.read_text(encoding="utf-8"))
        return [Conversation(tuple(Turn(*turn) for turn in turns)) for turns in rows]
    conversations = reader.pick_rows([file.path for file in dataset.files], numbers, schema)
    with contextlib.suppress(OSError):
        system_files.write_json(cached, [conversation.turns for conversation in conversations])
    return conversations


def split_for_validation(options: FinetuneConfig, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training rows, repeated by their weights, and of the validation rows.

    Validation rows come from --eval_data_path, or are split off by --test_size. Raises UserError (exit 3)
    when there are none of one kind.
    """
    is_validation = dataset.is_validation
    training, validation = np.flatnonzero(~is_validation), np.flatnonzero(is_validation)
    if not options.eval_data_path:
        first, second = data_examples.split(len(training), options.test_size, options.seed)
        training, validation = training[first], training[second]
    elif not len(training) or not len(validation):
        which = "--eval_data_path" if len(training) else "--data_path"
        raise UserError(f"{which} has no usable row.", "Raise --cutoff_len or check the rows.", DATA)
    training = data_examples.repeated(training, dataset.weights[training], options.seed)
    if not len(training):
        raise UserError(
            f"--data_path {options.data_path}: no row is left with these weights.", "Raise the weights.", DATA
        )
    return training, validation
