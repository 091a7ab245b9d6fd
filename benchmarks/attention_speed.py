#!/usr/bin/env python3
"""How much faster OneCard's own attention backward pass and its dropout are on this CPU.

    .venv/bin/python benchmarks/attention_speed.py [--tokens 2048] [--repeats 15]

The first table is for documents of one length, packed to about 2048 tokens in the shapes of the demo
model (9 heads, 3 key/value heads of 64, bf16). It compares the backward pass with one torch call per
document (packed_attention.each_document) with the batched one for short documents (packed_attention). The
batched pass is used for every length here, so that the table shows where packed_attention.SHORT should
be. The second table compares CheapDropout with torch.nn.Dropout. Both sides take turns, and the best time
of each counts. On a busy machine the figures mean nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from onecard.models import packed_attention
from onecard.models.dropout import CheapDropout
from onecard.system import hardware

LENGTHS = (64, 105, 184, 256, 320, 512, 1024, 2048)
HEADS, KV_HEADS, SIZE, HIDDEN = 9, 3, 64, 576
DROPOUT = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a packed row, at most")
    parser.add_argument("--repeats", type=int, default=15, help="repetitions, of which the best counts")
    args = parser.parse_args()
    if args.tokens < max(LENGTHS) or args.repeats < 1:
        parser.error(f"--tokens must be {max(LENGTHS)} or more, --repeats 1 or more")

    print(
        f"{date.today().isoformat()}; {hardware.describe_machine()}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; best of {args.repeats}.\n"
    )
    print(f"Backward pass of attention, bf16, {HEADS} heads, {KV_HEADS} key/value heads of {SIZE}; documents")
    print(
        f"longer than {packed_attention.SHORT} tokens are given to torch in training. The difference is the"
    )
    print("largest between the two gradients, relative to the largest gradient.\n")
    print("| document | packed tokens | each_document, ms | packed_attention, ms | ratio | difference |")
    print("|---:|---:|---:|---:|---:|---:|", flush=True)
    for length in LENGTHS:
        print(attention_line(length, args.tokens // length, args.repeats), flush=True)

    print(f"\nDropout of [{args.tokens}, {HIDDEN}] in bf16, p = {DROPOUT}.\n")
    print("| | torch.nn.Dropout, ms | CheapDropout, ms | ratio |")
    print("|---|---:|---:|---:|", flush=True)
    x = torch.randn(args.tokens, HIDDEN).bfloat16().requires_grad_()
    grad = torch.randn_like(x)
    ways = [torch.nn.Dropout(DROPOUT), CheapDropout(DROPOUT)]
    forward = best([lambda way=way: way(x) for way in ways], args.repeats)
    print(dropout_line("forward", forward))
    both = best([lambda way=way: torch.autograd.grad(way(x), x, grad) for way in ways], args.repeats)
    print(dropout_line("forward and backward", both))


def attention_line(length: int, documents: int, repeats: int) -> str:
    """One row of the table, for `documents` documents of `length` tokens each."""
    lengths, tokens = (length,) * documents, length * documents
    query, key, value = inputs = [random_heads(heads, tokens) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    each = packed_attention.each_document(query, key, value, lengths, SIZE**-0.5).transpose(1, 2)
    with mock.patch.object(packed_attention, "SHORT", length):  # the batched pass for documents of any length
        packed, _ = packed_attention.packed_attention(
            torch.nn.Module(), query, key, value, None, document_lengths=lengths
        )
    grad = torch.randn_like(each)

    def backward(output: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(output, inputs, grad, retain_graph=True)

    apart = max(
        ((one.float() - other.float()).abs().max() / one.float().abs().max()).item()
        for one, other in zip(backward(each), backward(packed), strict=True)
    )
    slow, fast = best([lambda: backward(each), lambda: backward(packed)], repeats)
    return f"| {length} | {tokens} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} | {apart:.1e} |"


def random_heads(heads: int, tokens: int) -> torch.Tensor:
    """[1, heads, tokens, SIZE] in bf16, laid out in memory as a model's projections are."""
    return torch.randn(1, tokens, heads, SIZE).bfloat16().transpose(1, 2).requires_grad_()


def best(ways: list[Callable[[], object]], repeats: int) -> list[float]:
    """The best time of each way in milliseconds. They take turns, so a busy moment slows down all of them."""
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats + 2):  # two rounds to warm up
        for way, milliseconds in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
            milliseconds.append(1000 * (time.perf_counter() - started))
    return [min(milliseconds[2:]) for milliseconds in times]


def dropout_line(name: str, times: list[float]) -> str:
    return f"| {name} | {times[0]:.2f} | {times[1]:.2f} | {times[0] / times[1]:.2f} |"


if __name__ == "__main__":
    main()
