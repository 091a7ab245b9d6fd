"""Answers of an engine with the margin of each token, and their comparison with those of one user alone."""

import torch

from onecard.config.generation import ActiveAdapters
from onecard.inference.engine import Engine

TIE = 1e-3  # log-probabilities this near may come in either order
Answer = list[tuple[int, float]]  # tokens, and how much more probable (in nats) each is than the second best


def answer(engine: Engine, prompt: list[int], mixture: ActiveAdapters, count: int) -> Answer:
    """The first `count` greedy tokens."""
    sequence = engine.open(prompt, mixture)
    try:
        for _ in sequence.read():
            pass
        scores, tokens = sequence.first(), []
        while True:
            best = torch.log_softmax(scores[0], 0).topk(2)
            tokens.append((int(best.indices[0]), float(best.values[0] - best.values[1])))
            if len(tokens) == count:
                return tokens
            scores = sequence.advance([0], [tokens[-1][0]])
    finally:
        sequence.close()


def first_difference(tokens: Answer, expected: Answer) -> str:
    """What differs from the cold answer before two of its tokens are nearly equal; "" if nothing does."""
    for place, ((token, _), (right, margin)) in enumerate(zip(tokens, expected, strict=True)):
        if margin < TIE:
            return ""
        if token != right:
            return f"token {place} is {token} and not {right}, which is better by {margin:.4f}"
    return ""
