#!/usr/bin/env python3
"""Speed and memory of OneCard's training on this CPU, compared with plain transformers Trainer + peft.

    .venv/bin/python benchmarks/train_speed.py [--rows 128] [--batch_size 16] [--output FILE.md]

Both sides train the same rows in the same order for one epoch, with the same model, bits, compute dtype,
prompt, adapter shape and start, learning rate and seed. The plain side pads micro-batches of 4 rows and
accumulates gradients, as most LoRA scripts do. OneCard is measured with its own micro-batch size, and
again with at most 1024 tokens per micro-batch and no more than the plain side's largest padded
micro-batch.

Each side is a process of its own (speed_sides.py), started in the same way, so its peak memory is that of
the whole process with imports and model loading. Its time is that of the training steps only. Another
process prepares the rows and measures how fast this machine multiplies matrices. This program imports only
the standard library, because a process on Linux starts with the peak of its parent. The result is a
Markdown table. The exit code is 0 whenever all sides ran, whatever the figures are. On a busy machine the
figures mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import speed_report  # beside this file, as speed_sides; both import only the standard library at their top
import speed_sides
from speed_sides import MICRO_BATCH, PREPARED

ROOT = Path(__file__).resolve().parent.parent
SMALL = 1024  # most tokens of the small micro-batch: half of the automatic one


def main() -> None:
    args = parse()
    if args.side:
        from onecard.errors import run_program

        run_program(lambda: one_side(args))  # ends the process
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="onecard-speed-") as name:
        folder = Path(name)
        prepared = run_side("prepare", args, folder, "preparing rows and model, measuring matrix products")
        if prepared["rows"] < args.rows:
            print(f"  {args.data_path} has only {prepared['rows']} usable rows", flush=True)
        same = min(MICRO_BATCH * prepared["longest"], SMALL)
        auto = run_side("onecard", args, folder, "OneCard, micro-batch auto")
        small = run_side("onecard", args, folder, f"OneCard, micro-batch {same} tokens", same)
        plain = run_side("plain", args, folder, f"plain Trainer + peft, {MICRO_BATCH} rows padded")
    names = [
        "OneCard, micro-batch auto",
        f"OneCard, micro-batch {same} tokens",
        f"plain Trainer + peft, {MICRO_BATCH} rows padded",
    ]
    text = speed_report.report(args, prepared, dict(zip(names, (auto, small, plain), strict=True)), load)
    print(f"\n{text}", end="", flush=True)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
        print(f"\nWritten to {args.output}")


def one_side(args: argparse.Namespace) -> None:
    """The work of a process that this program started: one measurement, whose result goes to a file."""
    sides = {
        "prepare": speed_sides.prepare_side,
        "onecard": speed_sides.onecard_side,
        "plain": speed_sides.plain_side,
    }
    if args.side == "onecard":
        from onecard.system import openmp

        openmp.choose()  # as finetune.py does before torch is imported
    folder = Path(args.folder)
    (folder / args.result).write_text(json.dumps(sides[args.side](args, folder)), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", default=str(ROOT / "sample" / "instruct.json"), help="rows")
    parser.add_argument("--model_path", default="demo", help="base model: a folder, a hub name, or demo")
    parser.add_argument("--bits", type=int, default=8, choices=(16, 8, 4), help="bits of a base weight")
    parser.add_argument("--cutoff_len", type=int, default=512, help="longest row, in tokens")
    parser.add_argument(
        "--rows", type=int, default=128, help="number of rows to train on, from the start of the file"
    )
    parser.add_argument(
        "--batch_size", type=int, default=16, help=f"rows per step, a multiple of {MICRO_BATCH}"
    )
    parser.add_argument("--output", metavar="FILE.md", help="also write the report into this file")
    for hidden in ("--side", "--folder", "--result", "--micro_batch_tokens"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch_size < 1 or args.batch_size % MICRO_BATCH:
        parser.error(f"--batch_size {args.batch_size}: must be a multiple of {MICRO_BATCH}")
    if args.rows < 1:
        parser.error(f"--rows {args.rows}: must be 1 or more")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    return args


def run_side(side: str, args: argparse.Namespace, folder: Path, title: str, tokens: int = 0) -> dict:
    """Run this program again as one side and return its result; on failure print its last lines and exit."""
    print(f"{title} ...", flush=True)
    started = time.monotonic()
    result = PREPARED if side == "prepare" else f"{side}-{tokens}.json"
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--result", result]
    command += ["--micro_batch_tokens", str(tokens or "auto")]
    for name in ("data_path", "model_path", "bits", "cutoff_len", "rows", "batch_size"):
        command += [f"--{name}", str(getattr(args, name))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if side == "plain":
        environment["THP_MEM_ALLOC_ENABLE"] = "0"  # importing onecard would set it to 1
    lines = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(("step ", "Fetching ", "matmul ")):
                print(f"  {line.rstrip()}", flush=True)
    if process.returncode:
        code = process.returncode
        print("".join(lines[-40:]), end="", file=sys.stderr)
        print(f"error: this side ended with exit code {code}; its last lines are above.", file=sys.stderr)
        sys.exit(code if code > 0 else 1)
    print(f"  done in {time.monotonic() - started:.0f} s, loading included", flush=True)
    return json.loads((folder / result).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
