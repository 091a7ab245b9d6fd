"""Rows of a file as token ids, and how probable a model finds their answers: what models are compared on.

Legend: V entries of the vocabulary.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from onecard.data import reader
from onecard.data.encode import encode_within
from onecard.data.schemas import BadRow
from onecard.data.template import Template, tokenizer_for
from onecard.errors import DATA, UserError

MOST_NATS = 700.0  # of a token: what exp() can still say
EvalRow = tuple[list[int], list[bool]]  # token ids, whether each is a target


def files(data_path: str) -> list[Path]:
    """The files of rows; raises UserError (exit 3) when one does not exist."""
    return [source.path for source in reader.locate_files(data_path)]


def some(
    data_path: str, cutoff_len: int, form: Template, tokenizer: Any, most: int | None = None
) -> list[EvalRow]:
    """The first rows that can be used, or all; raises UserError (exit 3) when there is none."""
    found = list(islice(read(data_path, cutoff_len, form, tokenizer), most))
    if not found:
        raise UserError(f"--data_path {data_path}: no row has an answer.", "Name others.", DATA)
    return found


def read(data_path: str, cutoff_len: int, form: Template, tokenizer: Any) -> Iterator[EvalRow]:
    """The rows that can be used, cut at so many tokens; raises UserError when the file cannot be read."""
    tokenizer = tokenizer_for(tokenizer, form)
    for row in (
        row for path in files(data_path) for row in reader.read_rows(path) if not isinstance(row, BadRow)
    ):
        try:
            ids, is_target, _ = encode_within(row, cutoff_len, form, tokenizer)
        except ValueError:  # the template has no such turn
            continue
        if any(is_target[1:]):
            yield ids, is_target


@torch.no_grad()
def answers(made: torch.nn.Module, rows: list[EvalRow], device: str) -> Iterator[tuple[torch.Tensor, float]]:
    """Of each row: logits [targets, V] in fp32 that predict its targets, and minus their log-probability."""
    for ids, is_target in rows:
        taken = torch.tensor(ids, device=device)
        places = torch.tensor(is_target[1:], device=device).nonzero().flatten()
        logits = made(taken[None], use_cache=False).logits[0, places].float().cpu()
        yield logits, F.cross_entropy(logits, taken[1:][places].cpu(), reduction="sum").item()


def perplexity(made: torch.nn.Module, rows: list[EvalRow], device: str, title: str) -> float:
    """Of a target token of these rows, as per_token; title: of the bar."""
    shown = tqdm(answers(made, rows, device), desc=title, total=len(rows), unit="row", disable=None)
    found = [(nats, len(logits)) for logits, nats in shown]
    return per_token(sum(nats for nats, _ in found), sum(count for _, count in found))


def per_token(nats: float, tokens: int) -> float:
    """Perplexity of tokens from minus the sum of their log-probabilities; not finite where that is not."""
    mean = nats / tokens
    return math.exp(min(mean, MOST_NATS)) if math.isfinite(mean) else mean
