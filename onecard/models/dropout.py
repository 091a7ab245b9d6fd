"""Dropout for the CPU that draws the random decisions for four elements from one 64-bit random number.

torch's dropout on the CPU draws one random number per element, which takes a noticeable share of a training
step (benchmarks/attention_speed.py). Here a random generator of numpy, which is seeded from torch's, draws
all numbers in one call. The dropout probability is rounded to 1/65536. The mask takes one byte per element.
"""

import numpy as np
import torch

LEVELS = 1 << 16  # values of a 16-bit random number


class CheapDropout(torch.nn.Module):
    """In training mode, set each element to zero with probability p and scale the others by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":  # the model was loaded on the CPU and moved to GPUs afterwards
            return torch.nn.functional.dropout(x, self.p)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as the matrix product that follows would
        return torch.where(self.mask(x), x, 0).mul_(1 / (1 - self.p))

    def mask(self, x: torch.Tensor) -> torch.Tensor:
        """A new random mask (bool) of x's shape; True where an element stays."""
        generator = np.random.SFC64(int(torch.randint(2**63 - 1, ())))
        numbers = torch.from_numpy(generator.random_raw(-(-x.numel() // 4)).view(np.int16))
        uniform = numbers[: x.numel()]  # each of -32768..32767 is equally likely
        return (uniform >= round(self.p * LEVELS) - LEVELS // 2).view(x.shape)

    def extra_repr(self) -> str:
        return f"p={self.p}"
