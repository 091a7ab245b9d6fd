"""Rows of a file, encoded as a training does it before its first step."""

from pathlib import Path

from onecard import config, reader, rows, template
from tests.support import tiny


def options(path: Path | str, **changes) -> config.FinetuneConfig:
    return config.FinetuneConfig(data_path=str(path), **{"cutoff_len": 400, **changes})


def encode(path: Path | str, tokenizer=None, fetch=None, **changes) -> rows.Rows:
    """The rows of a file, by default with the tiny tokenizer; changes: of a training's options."""
    given, tokenizer = options(path, **changes), tokenizer or tiny.tokenizer()
    forms = [template.load(name, tokenizer) for name in given.template.split(",")]
    sources = reader.sources(given.data_path, given.eval_data_path, fetch)
    return rows.encode(given, sources, forms, tokenizer, "tokenizer 1")
