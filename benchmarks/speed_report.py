"""The report of train_speed.py in Markdown: table, verdicts, loss curves."""

import argparse
import sys
from datetime import date
from pathlib import Path
from statistics import mean

TARGET_SPEED, TARGET_MEMORY = 2.0, 0.6  # OneCard / plain, at least and at most
CURVE_LINES = 20  # steps shown of the loss curves


def report(args: argparse.Namespace, prepared: dict, sides: dict[str, dict], load: float) -> str:
    """The Markdown text.

    sides: name -> what was measured; the last one is the plain side. load: load average at the start.
    """
    auto, small, plain = sides.values()
    work = 4 * (
        prepared["frozen_weights"] * prepared["tokens"] + prepared["head_weights"] * prepared["targets"]
    )
    fastest = max(prepared["matmul"].values())
    table = [
        "| | tokens/s | ratio | peak memory | ratio | steps, s | matmul share |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    plain_speed = plain["tokens"] / plain["seconds"]
    verdicts = []
    for name, side in sides.items():
        speed, share = side["tokens"] / side["seconds"], work / side["seconds"] / fastest
        faster, smaller = speed / plain_speed, side["peak"] / plain["peak"]
        table.append(
            f"| {name} | {speed:.0f} | {faster:.2f} | {side['peak'] / 2**30:.2f} GiB | {smaller:.2f} "
            f"| {side['seconds']:.1f} | {100 * share:.0f} % |"
        )
        if side is not plain:
            speed_met = "met" if faster >= TARGET_SPEED else "NOT met"
            memory_met = "met" if smaller <= TARGET_MEMORY else "NOT met"
            verdicts.append(
                f"- {name}: {faster:.2f}x tokens/s (target at least {TARGET_SPEED}: {speed_met}), "
                f"{smaller:.2f}x peak memory (target at most {TARGET_MEMORY}: {memory_met})"
            )
    padding = 100 * (1 - prepared["tokens"] / prepared["padded"])
    matmul = ", ".join(f"{shape} {speed / 1e9:.0f}" for shape, speed in prepared["matmul"].items())
    versions = ", ".join(f"{name} {version}" for name, version in prepared["versions"].items())
    weights = "no quantisation" if args.bits == 16 else "bitsandbytes"
    parts = [
        "# Training speed: OneCard against plain Trainer + peft",
        f"{date.today().isoformat()}; {prepared['machine']}; {prepared['threads']} torch threads, "
        f"load average {load:.1f} at the start.\n"
        f"Python {sys.version.split()[0]}, {versions}.",
        f"{args.model_path}, {args.bits} bits ({weights}), {prepared['dtype']} "
        f"({prepared['dtype_reason']}), {prepared['rows']} rows of {Path(args.data_path).name}, "
        f"{prepared['tokens']} tokens of which {prepared['targets']} targets, longest row "
        f"{prepared['longest']}, cut at {args.cutoff_len}; batch {args.batch_size} rows, one epoch.",
        "\n".join(table),
        "\n".join(verdicts),
        "Tokens are real ones, without padding; the plain side's micro-batches are "
        f"{padding:.0f} % padding. Memory is the whole process's peak; the plain one had reached "
        f"{plain['loaded'] / 2**30:.2f} GiB before its first step. Steps leave out loading and saving.",
        f"Matrix products in {prepared['dtype']}, median of several, GFLOP/s (tokens x inputs x outputs): "
        f"{matmul}. The share is of the fastest, counting 4 FLOP per token for each of the "
        f"{prepared['frozen_weights']:,} frozen weights of the linear layers and 4 per target for each of "
        f"the {prepared['head_weights']:,} of the head: {work / 1e12:.2f} TFLOP for the run. The plain side "
        "computes its padding and the head at every place besides, which is not counted.",
        curves(auto, small, plain),
    ]
    return "\n\n".join(parts) + "\n"


def curves(auto: dict, small: dict, plain: dict) -> str:
    """The losses of the steps as a table, and the differences between the sides."""
    losses = list(zip(auto["losses"], small["losses"], plain["losses"], strict=True))
    every = -(-len(losses) // CURVE_LINES)
    lines = ["| step | OneCard, auto | OneCard, small | plain |", "|---:|---:|---:|---:|"]
    for step, row in enumerate(losses, start=1):
        if step == 1 or step % every == 0 or step == len(losses):
            lines.append(f"| {step} | " + " | ".join(f"{loss:.4f}" for loss in row) + " |")
    apart = [abs(one - other) for one, _, other in losses]
    itself = [abs(one - other) for one, other, _ in losses]
    norms = ", ".join(f"{side['first_norm']:.4f}" for side in (auto, small, plain))
    return (
        "Loss in nats per target token:\n\n" + "\n".join(lines) + "\n\n"
        f"OneCard (auto) and plain differ by at most {max(apart):.4f}, {mean(apart):.4f} on average; OneCard "
        f"differs from itself with small micro-batches by at most {max(itself):.4f}, {mean(itself):.4f} on "
        "average. Rows, their order and the adapter's start are the same; the dropout masks are not, and "
        f"low-precision sums are rounded in another order. Gradient norms of the first step: {norms}."
    )
