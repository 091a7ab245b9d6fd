#!/usr/bin/env python3
"""What a checkpoint costs: time, disk space and memory of a save, for adapters of several sizes.

    .venv/bin/python benchmarks/save_cost.py

Each size is saved 20 times, together with AdamW's moments, in a process of its own. A save writes, syncs,
hashes, renames and reads back. The last column is the peak memory minus the memory before the first save.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from memory_rise import memory_rise  # beside this file
from safetensors.torch import save_file

from onecard.runs import checkpoint as runs_checkpoint
from onecard.system import hardware
from onecard.training import plan

SAVES = 20
SIZES = {"demo, rank 8 on q,v": 460_800, "7B, rank 8 on q,v": 4_194_304, "7B, rank 16 on all": 39_976_960}


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()  # it has no options
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions().items())
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}; {versions}.\n")
    print("| adapter | weights | median save | slowest | on the disk | peak memory rises by |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, weights in SIZES.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, size, rise = pool.submit(measure, weights).result()
        middle, worst = statistics.median(seconds) * 1000, max(seconds) * 1000
        print(
            f"| {name} | {weights:,} | {middle:.0f} ms | {worst:.0f} ms "
            f"| {size / 2**20:.1f} MiB | {rise / 2**20:.1f} MiB |"
        )


def measure(weights: int) -> tuple[list[float], int, int]:
    """Return the seconds of each save, the bytes of a checkpoint, and the bytes by which the peak rises."""
    parameter = torch.nn.Parameter(torch.ones(weights))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parameter.grad = None

    def save_adapter(place: Path) -> None:
        save_file({"adapter": parameter.detach()}, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text("{}", encoding="utf-8")

    seconds, scaler = [], torch.amp.GradScaler("cpu", enabled=False)
    with tempfile.TemporaryDirectory(prefix="onecard-save-", dir=Path.cwd()) as name:
        folder = Path(name)

        def saves() -> None:
            for step in range(1, SAVES + 1):
                started = time.monotonic()
                runs_checkpoint.save(
                    folder, runs_checkpoint.Progress(step=step), save_adapter, optimizer, scaler
                )
                runs_checkpoint.prune(folder, 1, 0)
                seconds.append(time.monotonic() - started)

        rise = memory_rise(saves)
        last = folder / f"checkpoint-{SAVES}"
        return seconds, sum(file.stat().st_size for file in last.iterdir()), rise


if __name__ == "__main__":
    main()
