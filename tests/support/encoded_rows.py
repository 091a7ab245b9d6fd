"""Rows of a file, encoded as a training does it before its first step."""

from pathlib import Path

from onecard.config import training as training_config
from onecard.data import dataset, reader
from onecard.data import template as templates
from tests.support import tiny


def options(path: Path | str, **changes) -> training_config.FinetuneConfig:
    return training_config.FinetuneConfig(data_path=str(path), **{"cutoff_len": 400, **changes})


def encode(path: Path | str, tokenizer=None, fetch=None, **changes) -> dataset.Dataset:
    """The rows of a file, by default with the tiny tokenizer; changes: of a training's options."""
    given, tokenizer = options(path, **changes), tokenizer or tiny.tokenizer()
    forms = [templates.load(name, tokenizer) for name in given.template.split(",")]
    sources = reader.locate_files(given.data_path, given.eval_data_path, fetch)
    return dataset.encode(given, sources, forms, tokenizer, "tokenizer 1")
