"""A sequence without a model: the scores of a step depend on its place and on the last token."""

import torch


class ScoreTable:
    """An engine.Sequence, as far as decoding uses one; `rows` are the scores that it has shown, in order."""

    def __init__(self, seed: int, vocabulary: int, prompt: list[int]):
        generator = torch.Generator().manual_seed(seed)
        self.scores = 3 * torch.randn(8, vocabulary, vocabulary, generator=generator)
        self.ids = list(prompt)
        self.rows: list[list[float]] = []

    def first(self) -> torch.Tensor:
        scores = self.scores[len(self.ids) % 8, self.ids[-1]]
        self.rows.append(scores.tolist())
        return scores[None]

    def advance(self, parents: list[int], tokens: list[int]) -> torch.Tensor:
        self.ids += tokens
        return self.first()
