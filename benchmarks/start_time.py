#!/usr/bin/env python3
"""How long each sub-command takes to answer --help. A mistake in the options is reported no sooner than
that.

    .venv/bin/python benchmarks/start_time.py [--times 5]

Each sub-command is started as `python -m onecard NAME --help`, one after the other. A first start does
not count, because it compiles the modules and reads the files from the disk.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import PROGRAMS
from onecard.system import hardware
from onecard.system.files import ROOT

MOST = 0.5  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=5, help="starts of each sub-command that count [5]")
    times = parser.parse_args().times
    load = os.getloadavg()[0]
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}; load average {load:.1f} at the start.")
    print(f"Python {sys.version.split()[0]}; median of {times} starts.\n")
    print("| command | median | slowest |")
    print("|---|---:|---:|")
    medians = [measure(name, times) for name in PROGRAMS]
    met = "met" if max(medians) < MOST else "NOT met"
    print(f"\nThe slowest median is {max(medians):.2f} s (target below {MOST} s: {met}).")


def measure(name: str, times: int) -> float:
    """Seconds of the median start of a sub-command; prints its row."""
    start(name)
    seconds = [start(name) for _ in range(times)]
    median = statistics.median(seconds)
    print(f"| `onecard {name} --help` | {median:.2f} s | {max(seconds):.2f} s |", flush=True)
    return median


def start(name: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "onecard", name, "--help"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
