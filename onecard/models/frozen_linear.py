"""Linear layers with frozen 8-bit and 4-bit weights that keep no activations for the backward pass.

A frozen weight needs no gradient, so the layer need not keep its input. It dequantises the weight before the
product, and once more in the backward pass. bitsandbytes stores and loads the weights, but its own layers are
not used: they keep their input where gradient checkpointing cannot free it, and the result of its 8-bit layer
depends on the device and on the other tokens of the micro-batch. This file does not know what a LoRA is.

Shapes: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit

Dequantise = Callable[[torch.dtype], torch.Tensor]  # dtype -> W [O, I]


class FrozenProduct(torch.autograd.Function):
    """x [..., I] -> x W^T + b [..., O]. It keeps only the function that dequantises W."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, bias: torch.Tensor | None, dequantise: Dequantise) -> torch.Tensor:
        ctx.dequantise = dequantise
        return torch.nn.functional.linear(x, dequantise(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad_output: torch.Tensor):
        return grad_output @ ctx.dequantise(grad_output.dtype), None, None


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """The 8-bit layer of bitsandbytes with a product that dequantises row by row: W = CB * SCB / 127."""

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] in this dtype."""
        if self.weight.CB is not None:
            self.init_8bit_state()
        scale = self.state.SCB / 127  # [O]
        return self.state.CB.to(dtype).mul_(scale.to(dtype).unsqueeze(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_product(x, self.bias, self.dequantise)


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """The 4-bit (NF4) layer of bitsandbytes with a product that dequantises the weight."""

    def dequantise(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [O, I] in this dtype."""
        return dequantize_4bit(self.weight.data, self.weight.quant_state).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return frozen_product(x, self.bias, self.dequantise)


def frozen_product(x: torch.Tensor, bias: torch.Tensor | None, dequantise: Dequantise) -> torch.Tensor:
    """x [..., I] -> x W^T + b [..., O] in the dtype of x; dequantise(dtype) returns W [O, I]."""
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # the product runs in the dtype of its input
        return FrozenProduct.apply(x, bias, dequantise)


def use_frozen_products(model: torch.nn.Module) -> int:
    """Replace every linear layer of bitsandbytes in `model` by a frozen one; returns how many there were.

    The new layers share the quantised weights, so they take no additional memory.
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
