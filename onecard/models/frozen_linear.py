"""Products with frozen 8- and 4-bit weights: dequantise, multiply, keep nothing for the backward pass.

A frozen weight needs no gradient, so its input need not be kept; the weight is dequantised again on the way
back. bitsandbytes stores and loads the weights. Its own products keep their input where gradient
checkpointing cannot free it, and its 8-bit product depends on the device and on a token's neighbours; these
do neither. This file does not know what a LoRA is.

Shapes: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit

Dequantise = Callable[[torch.dtype], torch.Tensor]  # dtype -> W [O, I]


class FrozenProduct(torch.autograd.Function):
    """x [..., I] -> x W^T + b [..., O]; saves only the way to get W again."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, dequantise: Dequantise) -> torch.Tensor:
        ctx.dequantise = dequantise
        return torch.nn.functional.linear(x, dequantise(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        return grad_output @ ctx.dequantise(grad_output.dtype), None, None


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer with a row-wise dequantised product: W = CB * SCB / 127."""

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        scale = self.state.SCB / 127  # [O]
        return self.state.CB.to(dtype).mul_(scale.to(dtype).unsqueeze(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_product(x, self.bias, self.dequantise)


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """bitsandbytes' NF4 layer with a dequantised product."""

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        return dequantize_4bit(self.weight.data, self.weight.quant_state).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_product(x, self.bias, self.dequantise)


def frozen_product(x: torch.Tensor, bias: torch.Tensor | None, dequantise: Dequantise) -> torch.Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # the product runs in the dtype of its input
        return FrozenProduct.apply(x, bias, dequantise)


def use_frozen_products(model: torch.nn.Module) -> int:
    """Swap every bitsandbytes linear layer of `model` for its frozen twin, in place; returns how many.

    The twin shares the quantised weight, so no memory is added.
    """
    swapped = 0
    for name, layer in list(model.named_modules()):
        twin = _twin(layer)
        if twin is not None:
            model.set_submodule(name, twin)
            swapped += 1
    return swapped


def _twin(layer: torch.nn.Module) -> torch.nn.Module | None:
    if type(layer) is bnb.nn.Linear8bitLt:
        twin = FrozenLinear8bit(
            layer.in_features, layer.out_features, False, has_fp16_weights=False, device="meta"
        )
        twin.state = layer.state
    elif type(layer) is bnb.nn.Linear4bit:
        twin = FrozenLinear4bit(
            layer.in_features, layer.out_features, False, layer.compute_dtype, device="meta"
        )
        twin.quant_state = layer.quant_state
    else:
        return None
    twin.weight, twin.bias = layer.weight, layer.bias
    twin.requires_grad_(False)
    return twin.train(layer.training)
