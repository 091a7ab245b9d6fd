"""Dropout that draws four elements' chances from one random number, for the CPU.

torch's CPU dropout draws one number per element, which shows in the time of a training step
(benchmarks/attention_speed.py). Here a generator of numpy's, seeded from torch's, draws them by the million.
The probability is rounded to 1/65536, the mask is kept as one byte an element.
"""

import numpy as np
import torch

LEVELS = 1 << 16  # values of a 16-bit chance


class CheapDropout(torch.nn.Module):
    """Zero each element with probability p and scale the others by 1 / (1 - p), while training."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":  # loaded on the CPU and spread over cards since
            return torch.nn.functional.dropout(x, self.p)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the product that follows casts it anyway
        return torch.where(self.keep(x), x, 0).mul_(1 / (1 - self.p))

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        """A new mask of x's shape, True where an element stays."""
        generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
        numbers = torch.from_numpy(generator.random_raw(-(-x.numel() // 4)).view(np.int16))
        chances = numbers[: x.numel()]  # each of -32768..32767 equally likely
        return (chances >= round(self.p * LEVELS) - LEVELS // 2).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"
