"""How much memory the weights of a base model take, from their shapes and files alone."""

from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from onecard.models import tensor_files

SAFETY = 0.8  # the share of the free memory that a plan may use


def weight_bytes(bare: torch.nn.Module, bits: int) -> int:
    """Bytes that the weights of a frozen base take in memory.

    bare: the model without its weights, in the dtype that stands for 16 bits. In 8 and 4 bits, every linear
    layer except the head is stored in the format of bitsandbytes.
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
    """Bytes in memory of a base whose files are quantised already.

    Quantised tensors take as much as in the files, plain ones as much as in the dtype of `bare`, which is the
    model without its weights in the dtype that stands for 16 bits. Raises UserError for damaged files.
    """
    plain, packed = dict(bare.named_parameters(remove_duplicate=False)), 0
    plain_bytes = {}  # tied weights count once
    for name, tensor in tensor_files.of_folder(Path(folder)).items():
        parameter = plain.get(name)
        is_plain = parameter is not None and tensor.dtype.is_floating_point
        if is_plain and tensor.shape == tuple(parameter.shape):
            plain_bytes[id(parameter)] = parameter.numel() * parameter.element_size()
        else:
            packed += tensor.size
    return packed + sum(plain_bytes.values())


def _packed_bytes(count: int, rows: int, bits: int) -> int:
    """Bytes of one quantised matrix of `count` weights and `rows` outputs.

    8 bits: one int8 per weight and a scale in fp32 per row. 4 bits: NF4 in blocks of 64 weights; each block
    has a scale of 8 bits, each 256 scales have a scale in fp32, and there are two tables of values (QLoRA,
    arXiv 2305.14314).
    """
    if bits == 8:
        return count + 4 * rows
    blocks = -(-count // 64)
    return -(-count // 2) + blocks + 4 * -(-blocks // 256) + 4 * (16 + 256 + 1)
