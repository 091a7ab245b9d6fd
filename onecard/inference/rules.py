"""How the scores of one step are changed before a token is chosen from them. Every function makes new scores.

The order is:
1. repetition penalty, then no repeated n-gram (options; the prompt counts too)
2. frequency and presence penalty, logit bias, grammar (fields of a request, see controls.py)
3. the least length of the answer, which forbids the EOS ids (decoding.py)
4. temperature, top_k, top_p (only for sampling)

The repetition penalty multiplies or divides by the sign of a score, so it comes before all that is added. A
grammar forbids, and nothing after it allows again.

Legend: B beams, V entries of the vocabulary, T tokens of prompt and answer.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from transformers import (
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from onecard.config.generation import Generation

Rule = Callable[[torch.Tensor | None, torch.Tensor], torch.Tensor]  # tokens so far [B, T], scores -> scores
AnswerRule = Callable[
    [list[int], torch.Tensor], torch.Tensor
]  # tokens of the answer, scores [1, V] -> scores


def of_settings(settings: Generation) -> Iterator[Rule]:
    """The rules that depend on earlier tokens, in the order in which transformers applies them."""
    if settings.repetition_penalty != 1:
        yield RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        yield NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size)


def warpers(settings: Generation, eos_ids: Sequence[int]) -> Iterator[Rule]:
    """The filters for sampling, those of transformers in its order."""
    if not settings.samples:
        return
    keep = 1 if settings.width == 1 else 1 + max(1, len(eos_ids))
    if settings.temperature != 1:
        yield TemperatureLogitsWarper(settings.temperature)
    if settings.top_k:
        yield TopKLogitsWarper(settings.top_k, min_tokens_to_keep=keep)
    if settings.top_p < 1:
        yield TopPLogitsWarper(settings.top_p, min_tokens_to_keep=keep)


def penalties(frequency: float, presence: float, before: Sequence[int] = ()) -> AnswerRule:
    """OpenAI's penalties: score - count * frequency - (count > 0) * presence.

    count: how often a token stands in the answer so far; before: the tokens that the answer begins with, when
    an earlier answer is continued. The prompt does not count.
    """

    def penalize(answer: list[int], scores: torch.Tensor) -> torch.Tensor:
        counts = collections.Counter(token for token in (*before, *answer) if token < scores.shape[-1])
        return _added(scores, {token: -count * frequency - presence for token, count in counts.items()})

    return penalize


def bias(amounts: Mapping[int, float]) -> AnswerRule:
    """Adds an amount to the score of each of these token ids; an id without a score is ignored."""

    def add(answer: list[int], scores: torch.Tensor) -> torch.Tensor:
        return _added(
            scores, {token: amount for token, amount in amounts.items() if token < scores.shape[-1]}
        )

    return add


def _added(scores: torch.Tensor, amounts: Mapping[int, float]) -> torch.Tensor:
    tokens = torch.tensor(list(amounts), dtype=torch.long, device=scores.device)
    values = torch.tensor(list(amounts.values()), dtype=scores.dtype, device=scores.device)
    return scores.index_add(1, tokens, values[None])
