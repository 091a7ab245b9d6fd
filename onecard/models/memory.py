"""Memory that a base model's weights take, from shapes and files alone."""

from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from onecard.models import tensor_files

SAFETY = 0.8  # share of the free memory that is planned for


def weight_bytes(bare: torch.nn.Module, bits: int) -> int:
    """Bytes of a frozen base. bare: without weights, in the dtype that 16 bits have.

    In 8 and 4 bits every linear layer but the head is stored as bitsandbytes does.
    """
    head = bare.get_output_embeddings()
    packed = {
        module.weight: isinstance(module, Conv1D)
        for module in bare.modules()
        if bits < 16 and isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    return sum(
        _packed_bytes(parameter.numel(), parameter.shape[packed[parameter]], bits)
        if parameter in packed
        else parameter.numel() * parameter.element_size()
        for parameter in bare.parameters()
    )


def stored_bytes(bare: torch.nn.Module, folder: str) -> int:
    """Bytes of a base whose files are quantised: theirs, and plain weights in the dtype that 16 bits have.

    bare: without weights, in that dtype.
    """
    plain, packed = dict(bare.named_parameters(remove_duplicate=False)), 0
    found = {}  # of tied weights one
    for name, tensor in tensor_files.of_folder(Path(folder)).items():
        own = plain.get(name)
        if own is not None and tensor.dtype.is_floating_point and tensor.shape == tuple(own.shape):
            found[id(own)] = own.numel() * own.element_size()
        else:
            packed += tensor.size
    return packed + sum(found.values())


def _packed_bytes(count: int, rows: int, bits: int) -> int:
    """One matrix as it is stored; rows: its outputs.

    8 bits: int8 and a scale a row. 4 bits: NF4 in blocks of 64 whose scales are 8 bits, in blocks of 256, and
    the two tables of values (QLoRA, arXiv 2305.14314).
    """
    if bits == 8:
        return count + 4 * rows
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
