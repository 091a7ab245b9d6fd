"""Rows on which models are compared or calibrated: their token ids, and how probable their targets are.

Legend: V entries of the vocabulary.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from onecard.data import reader
from onecard.data.encode import encode_within
from onecard.data.markers import Markers
from onecard.data.schemas import BadRow
from onecard.data.template import Template, tokenizer_for
from onecard.errors import DATA, UserError
from onecard.evaluation import likelihood
from onecard.system.console import say

EvalRow = tuple[list[int], list[bool]]  # token ids, whether each is a target


def files(data_path: str) -> list[Path]:
    """The files that --data_path names; raises UserError (exit 3) when one does not exist."""
    return [source.path for source in reader.locate_files(data_path)]


def some(
    data_path: str,
    cutoff_len: int,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    most: int | None = None,
) -> list[EvalRow]:
    """The first `most` usable rows, or all; raises UserError (exit 3) when there is none."""
    rows = list(islice(read(data_path, cutoff_len, template, tokenizer), most))
    if not rows:
        raise UserError(
            f"--data_path {data_path}: no row has an answer.", "Name a file whose rows have answers.", DATA
        )
    return rows


def read(
    data_path: str, cutoff_len: int, template: Template, tokenizer: PreTrainedTokenizerBase
) -> Iterator[EvalRow]:
    """The usable rows, each cut to cutoff_len tokens; raises UserError when a file cannot be read.

    As in training, a template's markers that a question carries already are taken off; the first is named.
    """
    tokenizer = tokenizer_for(tokenizer, template)
    markers, named = Markers([template], tokenizer), set()
    for row in (
        row for path in files(data_path) for row in reader.read_rows(path) if not isinstance(row, BadRow)
    ):
        row, marked = markers.unwrap(row)
        if marked and marked.is_whole and marked not in named:
            named.add(marked)
            say(f"{data_path}: the markers of {marked.template} around questions are taken off.")
        try:
            ids, is_target, _ = encode_within(row, cutoff_len, template, tokenizer)
        except ValueError:  # the template cannot express a turn of this row
            continue
        if any(is_target[1:]):
            yield ids, is_target


@torch.no_grad()
def answers(model: torch.nn.Module, rows: list[EvalRow]) -> Iterator[tuple[torch.Tensor, float]]:
    """For each row, the logits [targets, V] that predict its targets, and minus their log-probability.

    The logits are in fp32 and on the CPU; the log-probability is in nats.
    """
    device = next(model.parameters()).device
    for ids, is_target in rows:
        token_ids = torch.tensor(ids, device=device)
        positions = torch.tensor(is_target[1:], device=device).nonzero().flatten()
        logits = model(token_ids[None], use_cache=False).logits[0, positions].float().cpu()
        yield logits, -likelihood.log_probability(logits, token_ids[1:][positions].cpu())


def perplexity(model: torch.nn.Module, rows: list[EvalRow], title: str) -> float:
    """The perplexity of the target tokens of these rows; title: of the progress bar."""
    scored_rows = tqdm(answers(model, rows), desc=title, total=len(rows), unit="row", disable=None)
    scores = [(nats, len(logits)) for logits, nats in scored_rows]
    return likelihood.perplexity(sum(nats for nats, _ in scores), sum(count for _, count in scores))
