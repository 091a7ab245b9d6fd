"""One step of several sequences in transformers: their caches become the rows of one, and come apart again.

A shorter cache is padded on its left, and a mask hides the padding. Only caches whose layers hold every token
can be joined; those of sliding windows and of recurrent layers cannot.

Legend: B sequences, T tokens of the longest one, H key/value heads, D size of a head.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def can_be_joined(model: Any, caches: Sequence[DynamicCache]) -> bool:
    """Whether this model can take a step of these sequences at once; model: the base, without adapters."""
    layers: list[Any] = [layer for cache in caches for layer in cache.layers]
    is_plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers)
    takes = inspect.signature(model.forward).parameters
    return is_plain and "position_ids" in takes and "attention_mask" in takes


def join(caches: Sequence[DynamicCache]) -> DynamicCache:
    """A cache of B rows with copies of the contents of these caches, which have one row each."""
    lengths = [cache.get_seq_length() for cache in caches]
    layers, columns = [], list[Any](zip(*(cache.layers for cache in caches), strict=True))
    for parts in columns:
        keys, values = (
            torch.cat([_padded(part, max(lengths)) for part in tensors])  # [B, H, T, D]
            for tensors in ([layer.keys for layer in parts], [layer.values for layer in parts])
        )
        layers.append((keys, values))
    return DynamicCache(layers)


def inputs_beside(caches: Sequence[DynamicCache], device: torch.device) -> dict[str, torch.Tensor]:
    """The mask [B, T + 1] and the positions [B, 1] of the next token of each of these caches."""
    lengths = [cache.get_seq_length() for cache in caches]
    longest = max(lengths)
    mask = [[0] * (longest - length) + [1] * (length + 1) for length in lengths]
    positions = [[length] for length in lengths]
    return {
        "attention_mask": torch.tensor(mask, device=device),
        "position_ids": torch.tensor(positions, device=device),
    }


def part_again(joined: DynamicCache, caches: Sequence[DynamicCache]) -> None:
    """Give each cache its row, with the new token; the rows share memory until the next step."""
    lengths = [cache.get_seq_length() + 1 for cache in caches]
    layers: list[Any] = list(joined.layers)
    for number, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        owns: list[Any] = list(cache.layers)
        for layer, own in zip(layers, owns, strict=True):
            own.keys = layer.keys[number : number + 1, :, -length:]
            own.values = layer.values[number : number + 1, :, -length:]


def let_go(cache: DynamicCache) -> None:
    """Copy what the cache holds, where it shares memory with other rows, which could then not be freed."""
    layers: list[Any] = list(cache.layers)
    for layer in layers:
        if layer.is_initialized and layer.keys.untyped_storage().nbytes() > layer.keys.nbytes:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """A row [1, H, t, D] as [1, H, length, D]."""
    return torch.nn.functional.pad(tensor, (0, 0, length - tensor.shape[-2], 0))
