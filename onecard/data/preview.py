"""The first rows of files as the model will see them, in runs of text that are learned or only read.

Both reports of rows, the training window's and tools/check_data.py's, mark them in the same way.
"""

import html
from collections.abc import Callable
from itertools import islice
from typing import Any

from onecard.config.training import FinetuneConfig
from onecard.data import encode as data_encode
from onecard.data import reader
from onecard.data import schemas as data_schemas
from onecard.data.schemas import BadRow
from onecard.data.template import Template

Row = tuple[str, list[tuple[str, bool]]]  # where and how long, its text in runs
Load = Callable[
    [str, str], tuple[Any, Template]
]  # base model, name of a template -> its tokenizer and template


def first_rows(options: FinetuneConfig, load: Load, count: int) -> list[Row]:
    """`count` rows, unusable ones with the reason; raises UserError for files, templates and tokenizers."""
    sources = reader.sources(options.data_path)
    tokenizer, template = load(options.model_path, options.template.split(",")[0].strip())
    made: list[Row] = []
    for source in sources:
        for line, column, value, text in islice(reader.values(source.path), count - len(made)):
            row = reader.conversation(line, column, value, text, options.schema)
            made.append(
                _seen(row, data_schemas.place(source.path, line, column), text, options, tokenizer, template)
            )
    return made


def marked(runs: list[tuple[str, bool]]) -> str:
    """Runs of text as HTML, what is learned inside of <mark>."""
    texts = ((html.escape(piece), target) for piece, target in runs)
    return "".join(f"<mark>{text}</mark>" if target else text for text, target in texts)


def _seen(row: Any, place: str, text: str, options: FinetuneConfig, tokenizer: Any, form: Any) -> Row:
    how = (options.train_on_inputs, options.train_on)
    try:
        if isinstance(row, BadRow):
            raise ValueError(row.reason)
        ids, is_target, cut = data_encode.encode_within(row, options.cutoff_len, form, tokenizer, *how)
    except ValueError as error:
        return f"{place} · {error}", [(str(text).strip(), False)]
    size = f"{len(ids)} tokens, {sum(is_target)} of them learned" + (", cut" if cut else "")
    return f"{place} · {size}", data_encode.runs(tokenizer, ids, is_target)
