"""Rows of a file as token ids, and how probable a model finds their answers: what models are compared on.

Legend: V entries of the vocabulary.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from onecard import reader
from onecard.prompt import Template, encode_within
from onecard.schemas import BadRow

Row = tuple[list[int], list[bool]]  # token ids, whether each is a target


def read(data_path: str, cutoff_len: int, form: Template, tokenizer: Any) -> Iterator[Row]:
    """The rows that can be used, cut at so many tokens; raises UserError when the file cannot be read."""
    paths = [source.path for source in reader.sources(data_path)]
    for row in (row for path in paths for row in reader.read_rows(path) if not isinstance(row, BadRow)):
        try:
            ids, is_target, _ = encode_within(row, cutoff_len, form, tokenizer)
        except ValueError:  # the template has no such turn
            continue
        if any(is_target[1:]):
            yield ids, is_target


@torch.no_grad()
def answers(made: torch.nn.Module, rows: list[Row], device: str) -> Iterator[tuple[torch.Tensor, float]]:
    """Of each row: logits [targets, V] in fp32 that predict its targets, and minus their log-probability."""
    for ids, is_target in rows:
        taken = torch.tensor(ids, device=device)
        places = torch.tensor(is_target[1:], device=device).nonzero().flatten()
        logits = made(taken[None], use_cache=False).logits[0, places].float().cpu()
        yield logits, F.cross_entropy(logits, taken[1:][places].cpu(), reduction="sum").item()


def perplexity(made: torch.nn.Module, rows: list[Row], device: str, title: str) -> float:
    """Of a target token of these rows; title: of the bar."""
    shown = tqdm(answers(made, rows, device), desc=title, total=len(rows), unit="row", disable=None)
    found = [(nats, len(logits)) for logits, nats in shown]
    return math.exp(min(sum(nats for nats, _ in found) / sum(count for _, count in found), 700))
