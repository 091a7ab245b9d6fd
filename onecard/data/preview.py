"""The first rows of a run's files as the model will see them, with the text that it learns marked.

The training window and the report of tools/check_data.py mark rows in the same way.
"""

import html
from collections.abc import Callable
from itertools import islice
from typing import Any

from onecard.config.training import FinetuneConfig
from onecard.data import encode as data_encode
from onecard.data import reader
from onecard.data import schemas as data_schemas
from onecard.data.conversation import Conversation
from onecard.data.markers import UNWRAP, Markers
from onecard.data.schemas import BadRow
from onecard.data.template import Template

PreviewRow = tuple[str, list[tuple[str, bool]]]  # a heading; texts, each with whether it is learned
LoadEncoder = Callable[[str, str], tuple[Any, Template]]  # base model, template name -> tokenizer, template


def first_rows(options: FinetuneConfig, load_encoder: LoadEncoder, count: int) -> list[PreviewRow]:
    """The first `count` rows; the heading of an unusable row gives the reason.

    load_encoder: gives the tokenizer (as template.tokenizer_for does) and the template. Raises UserError when
    a file, the template or the tokenizer cannot be used.
    """
    files = reader.locate_files(options.data_path)
    tokenizer, template = load_encoder(options.model_path, options.template.split(",")[0].strip())
    markers = Markers([template], tokenizer)
    rows: list[PreviewRow] = []
    for file in files:
        for line, column, value, text in islice(reader.values(file.path), count - len(rows)):
            conversation = reader.conversation(line, column, value, text, options.schema)
            location = data_schemas.location(file.path, line, column)
            rows.append(_preview(conversation, location, text, options, tokenizer, template, markers))
    return rows


def marked(runs: list[tuple[str, bool]]) -> str:
    """Texts as HTML, those that are learned inside <mark>."""
    texts = ((html.escape(piece), target) for piece, target in runs)
    return "".join(f"<mark>{text}</mark>" if target else text for text, target in texts)


def _preview(
    row: Conversation | BadRow,
    location: str,
    text: str,
    options: FinetuneConfig,
    tokenizer: Any,
    template: Template,
    markers: Markers,
) -> PreviewRow:
    targets = (options.train_on_inputs, options.train_on)
    try:
        if isinstance(row, BadRow):
            raise ValueError(row.reason)
        plain, marked = markers.unwrap(row)
        row = plain if options.marked_rows == UNWRAP else row
        ids, is_target, was_cut = data_encode.encode_within(
            row, options.cutoff_len, template, tokenizer, *targets
        )
    except ValueError as error:
        return f"{location} · {error}", [(str(text).strip(), False)]
    size = f"{len(ids)} tokens, {sum(is_target)} of them learned" + (", cut" if was_cut else "")
    if marked and marked.is_whole:
        done = "were taken off" if options.marked_rows == UNWRAP else "are kept"
        size += f"; the markers of {marked.template} {done}"
    return f"{location} · {size}", data_encode.runs(tokenizer, ids, is_target)
