"""What all processes of a run do together: join, wait, sum, agree and gather.

It works under torchrun (gloo on the CPU, nccl on GPUs), and without it in a single process.
system/processes.py knows which of the processes this is.
"""

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist

from onecard.system import processes as system_processes


def start(device: torch.device, alone_too: bool = False) -> None:
    """Join the other processes when torchrun started several; alone_too: form a group of one otherwise.

    Tensors on the CPU always go through gloo.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if dist.is_initialized():
        return
    if system_processes.world_size() > 1:
        dist.init_process_group(backend)
    elif alone_too:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def stop() -> None:
    """Leave the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The tensor with the sum over all processes; changes it in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_processes(flag: bool) -> bool:
    """Whether `flag` is true in every process."""
    return bool(smallest(int(flag)))


def smallest(number: int) -> int:
    """The smallest of all processes' numbers."""
    if not dist.is_initialized():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MIN)
    return value.item()


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    return -smallest(-number)


def agree(text: str) -> bool:
    """Whether all processes have the same text."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
    return smallest(number) == largest(number)


def sum_gradients(parameters: Iterable[torch.nn.Parameter], also: torch.Tensor) -> torch.Tensor:
    """Sum every gradient and the tensor `also` over all processes, in one flat fp32 buffer.

    A process without micro-batches in this step adds zeros. Returns the sum of `also`.
    """
    if not dist.is_initialized():
        return also
    parameters = list(parameters)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.float().flatten() for g in gradients), also.float().flatten()])
    dist.all_reduce(flat)
    pieces = flat.split([p.numel() for p in parameters] + [also.numel()])
    for parameter, piece in zip(parameters, pieces, strict=False):
        parameter.grad = piece.view_as(parameter).to(parameter.dtype)
    return pieces[-1].to(also.dtype).view_as(also)


def gather_rows(rows: list[int]) -> list[int]:
    """The row numbers of all processes, in rank order."""
    if not dist.is_initialized():
        return rows
    lists = [None] * system_processes.world_size()
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]
