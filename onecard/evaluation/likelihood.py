"""How probable a model finds tokens, and the perplexity that follows: one definition for all comparisons.

Shapes: T tokens, V entries of the vocabulary.
"""

import math

import torch

MOST_NATS = 700.0  # per token; math.exp overflows soon above it


def log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """The sum of the log-probabilities (nats) of T tokens.

    logits [T, V]: those that predict the tokens, in any dtype; tokens [T]: ids. The log-softmax is computed
    in fp32, the sum in double precision.
    """
    chosen = logits.float().log_softmax(-1).gather(1, tokens.to(logits.device)[:, None])
    return chosen.double().sum().item()


def perplexity(nats: float, count: int) -> float:
    """exp(nats / count), where nats is minus the sum of the log-probabilities (Jelinek et al. 1977).

    It is per token when count is a number of tokens, and per byte when it is a number of bytes. When nats is
    infinite or NaN, so is the result; a finite one is at most exp(MOST_NATS).
    """
    mean = nats / count
    return math.exp(min(mean, MOST_NATS)) if math.isfinite(mean) else mean
