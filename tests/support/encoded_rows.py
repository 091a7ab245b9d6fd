"""The rows of a file, encoded as before the first step of a training."""

from pathlib import Path

from onecard.config import training as config_training
from onecard.data import dataset, reader
from onecard.data import template as data_template
from tests.support import tiny


def options(path: Path | str, **changes) -> config_training.FinetuneConfig:
    return config_training.FinetuneConfig(data_path=str(path), **{"cutoff_len": 400, **changes})


def encode(path: Path | str, tokenizer=None, fetch=None, **changes) -> dataset.Dataset:
    """The encoded rows of a file, by default with the tiny tokenizer; changes: options of the training."""
    settings, tokenizer = options(path, **changes), tokenizer or tiny.tokenizer()
    row_templates = [data_template.load(name, tokenizer) for name in settings.template.split(",")]
    validation = reader.locate_validation_files(settings.eval_data_path, fetch)
    files = [*reader.locate_files(settings.data_path, fetch), *validation]
    own_tokenizer = data_template.tokenizer_for(tokenizer, *row_templates)
    return dataset.encode(settings, files, row_templates, own_tokenizer, "tokenizer 1")
