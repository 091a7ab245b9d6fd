"""The first rows of files as the model will see them, in runs of text that are learned or only read.

Both reports of rows, the training window's and tools/check_data.py's, mark them in the same way.

It loads a tokenizer, never a model.
"""

import functools
import html
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

from onecard import prompt, reader, schemas
from onecard.config import FinetuneConfig
from onecard.schemas import BadRow

Row = tuple[str, list[tuple[str, bool]]]  # where and how long, its text in runs
_loading = threading.Lock()


def first_rows(options: FinetuneConfig, locate: Callable[[str], str], count: int) -> list[Row]:
    """`count` rows, the unusable ones with the reason; raises UserError for files, templates and tokenizers.

    locate: name of a model -> folder.
    """
    sources = reader.sources(options.data_path)
    with _loading:
        load = _load(locate(options.model_path), options.template.split(",")[0].strip())
    made: list[Row] = []
    for source in sources:
        for line, column, value, text in islice(reader.values(source.path), count - len(made)):
            row = reader.conversation(line, column, value, text, options.schema)
            made.append(_seen(row, schemas.place(source.path, line, column), text, options, *load))
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
        ids, is_target, cut = prompt.encode_within(row, options.cutoff_len, form, tokenizer, *how)
    except ValueError as error:
        return f"{place} · {error}", [(str(text).strip(), False)]
    size = f"{len(ids)} tokens, {sum(is_target)} of them learned" + (", cut" if cut else "")
    return f"{place} · {size}", prompt.runs(tokenizer, ids, is_target)


@functools.lru_cache(maxsize=2)
def _load(folder: str, name: str) -> tuple[Any, Any]:
    from onecard import model, template  # they bring torch, which a window alone does not need

    template.check(name)
    tokenizer = model.load_tokenizer(folder)
    return tokenizer, template.load(name, tokenizer)
