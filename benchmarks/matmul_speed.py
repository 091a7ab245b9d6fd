"""How fast this machine multiplies matrices in the shapes of a model. train_speed.py uses it."""

import time
from statistics import median
from typing import Any

import torch

TOKENS, SQUARE, SECONDS = 2048, 4096, 1.5


def measure(dtype: Any, hidden: int, inner: int) -> dict[str, float]:
    """The median FLOP per second by shape, for two products of the model and a large square one."""
    square = SQUARE
    shapes = [(TOKENS, hidden, inner), (TOKENS, inner, hidden), (square, square, square)]
    speeds = {}
    for tokens, inputs, outputs in shapes:
        x, weight = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        times, until = [], time.monotonic() + SECONDS
        while len(times) < 5 or time.monotonic() < until:
            started = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - started)
        name = f"{tokens}x{inputs}x{outputs}"
        speeds[name] = 2 * tokens * inputs * outputs / median(times)
        print(f"matmul {name} {speeds[name] / 1e9:.0f} GFLOP/s", flush=True)
    return speeds
