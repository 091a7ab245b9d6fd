#!/usr/bin/env python3
"""Kill a training run of the demo model ten times (SIGKILL), continue it each time, and compare it with a
run that was never killed.

    .venv/bin/python benchmarks/ten_kills.py [--kills 10] [--seed 11]

The first kill comes before the first save, the others at random moments after a step. At the end the
adapter, the last optimizer state and the log (without its times) must equal those of the other run;
otherwise the exit code is 1. This takes some minutes.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = 14
OPTIONS = ["--batch_size=4", "--cutoff_len=128", f"--max_steps={STEPS}", "--test_size=2", "--eval_steps=5"]
OPTIONS += ["--save_steps=1", "--learning_rate=1e-3"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=10, help="SIGKILLs in a row")
    parser.add_argument("--seed", type=int, default=11, help="seed of the random moments")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory(prefix="onecard-kills-") as name:
        whole, killed = Path(name) / "whole", Path(name) / "killed"
        with start("finetune.py", *OPTIONS, "--output_path", str(whole)) as process:
            if process.wait():
                sys.exit("error: the run without kills failed. To see why: .venv/bin/python finetune.py")
        print(f"whole run: {STEPS} steps", flush=True)
        for number in range(1, args.kills + 1):
            begin = ("finetune.py", *OPTIONS) if number == 1 else ("finetune_continue.py",)
            with start(*begin, "--output_path", str(killed)) as process:
                wait_for_progress(killed, process, first=number == 1)
                time.sleep(0 if number == 1 else moments.uniform(0, 2))
                process.kill()
            saved = sorted(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
            print(
                f"kill {number}: saved steps {saved or 'none'}, log at step {last_step(killed)}", flush=True
            )
        with start("finetune_continue.py", "--output_path", str(killed)) as process:
            code = process.wait()
        same = {
            "exit code 0": code == 0,
            "adapter": equal(whole, killed, "adapter_model.safetensors"),
            "optimizer state": equal(whole, killed, f"checkpoint-{STEPS}/optimizer.safetensors"),
            "log": log(whole) == log(killed),
        }
    for part, is_same in same.items():
        print(f"{part}: {'equal' if is_same else 'DIFFERENT'}")
    sys.exit(not all(same.values()))


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)


def wait_for_progress(run: Path, process: subprocess.Popen, first: bool) -> None:
    """Wait until the run folder exists (first), or the log has one more step, or the process ends."""
    before = last_step(run)
    while process.poll() is None:
        if (run / "finetune_config.json").exists() if first else last_step(run) > before:
            return
        time.sleep(0.01)


def last_step(run: Path) -> int:
    return max([record["step"] for record in log(run)], default=-1)


def log(run: Path) -> list[dict]:
    """The records of a run's log, without their times and without an incomplete last line."""
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    clocks = ("seconds", "peak_memory_bytes")
    return [{key: value for key, value in record.items() if key not in clocks} for record in records]


def equal(one: Path, other: Path, name: str) -> bool:
    return (one / name).is_file() and (one / name).read_bytes() == (other / name).read_bytes()


if __name__ == "__main__":
    main()
