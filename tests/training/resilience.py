"""What stopping costs: the whole grid of interruptions, and the same for transformers' Trainer.

    .venv/bin/python -m tests.training.resilience [--kills 200] [--flips 1000] [--output FILE.md]

The tests beside this file take a part of these cells; docs/resilience.md shows what all of them gave.

A small random Llama (2 layers, 12 heads, 4 key/value heads) is trained for 12 uneven steps with dropout on,
in fp32 on one thread. A cell is one interruption; it passes when the continued run equals the run that was
never touched, bit for bit: adapter, optimizer state, position, and the log without its clocks. The Trainer
trains the same model with the same adapter, saves every step, and goes on by its own resume_from_checkpoint;
its cells compare the adapter's bytes alone. It needs what the tests need: bash tools/setup.sh test.
Bit-equality is claimed for one machine, one number of threads and one set of versions.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.system import hardware
from onecard.training import plan
from tests.support import power_failure, tiny
from tests.support.harness import Harness, started
from tests.support.paths import ROOT
from tests.support.resume_cases import STEPS, VARIANTS, differences, flags, outcome, stopped_at

ROWS = (1, 5, 6, 24)  # usable rows of the runs with uneven ends
SEED = 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs at random moments")
    parser.add_argument("--flips", type=int, default=1000, help="flipped bits")
    parser.add_argument("--trainer_kills", type=int, default=20, help="SIGKILLs and flips of the Trainer")
    parser.add_argument("--output", metavar="FILE.md", help="also write the report here")
    parser.add_argument("--trainer", nargs=3, help=argparse.SUPPRESS)  # model, folder, checkpoint or -
    args = parser.parse_args()
    if args.trainer:
        train_with_trainer(*args.trainer)
        return
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="onecard-resilience-") as name, started() as harness:
        place = Path(name)
        model, rows = tiny.save_model(place / "model"), tiny.save_rows(place / "rows.json", 24)
        resumed = resumes(harness, model, rows, place)
        killed = signals(harness, model, rows, place, args.kills, -9)
        stopped = signals(harness, model, rows, place, args.kills // 2, 143)
        table = [
            ("resumed bit-equal, every step of 6 variants (T1)", *resumed),
            ("resumed bit-equal, uneven ends (T4)", *uneven_ends(harness, model, place)),
            (
                "killed in every step of one run, bit-equal at the end (T2)",
                *chain(harness, model, rows, place),
            ),
            ("SIGKILL at random moments survived (T14)", *killed),
            ("SIGTERM survived, last step saved (T12)", *stopped),
            ("power-loss states survived (C3)", *power_loss(place)),
            ("flipped bits detected (C8)", *flips(place, args.flips)),
        ]
        theirs = trainer_rows(model, place, args.trainer_kills)
    text = report(table, theirs, time.monotonic() - start)
    print(f"\n{text}", end="", flush=True)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")


def count(title: str, cells: list[bool]) -> tuple[int, int]:
    print(f"{title}: {sum(cells)} of {len(cells)}", flush=True)
    return sum(cells), len(cells)


def bar(items: list[Any], title: str) -> Any:
    return tqdm(items, desc=title, unit="cell", disable=None)


def straight(harness: Harness, settings: dict[str, Any]) -> Path:
    answer = harness.run("finetune", settings)
    if answer["code"]:
        sys.exit(f"error: the untouched run failed:\n{answer['said']}")
    return Path(settings["output_path"])


def resumes(harness: Harness, model: Path, rows: Path, place: Path) -> tuple[int, int]:
    cells = []
    for number, (variant, changes) in enumerate(VARIANTS.items()):
        whole = straight(harness, flags(model, rows, place / f"whole-{number}", **changes))
        expected = outcome(whole)

        def cell(step: int, whole: Path = whole, expected: dict = expected, number: int = number) -> bool:
            run = stopped_at(whole, step, place / f"resumed-{number}-{step}")
            return go_on_and_compare(harness, run, expected)

        print(f"  {variant}", flush=True)
        cells += harness.map(cell, bar(range(STEPS), variant))
    return count("resumes", cells)


def go_on_and_compare(harness: Harness, run: Path, expected: dict) -> bool:
    answer = harness.run("finetune_continue", {"output_path": run})
    same = answer["code"] == 0 and not differences(expected, outcome(run))
    shutil.rmtree(run)
    return same


def uneven_ends(harness: Harness, model: Path, place: Path) -> tuple[int, int]:
    cells = []
    for number in ROWS:
        rows = tiny.save_rows(place / f"rows-{number}.json", number)
        for batch in (4, 6):
            changes = {"test_size": 0, "batch_size": batch, "max_steps": 5, "warmup_steps": 0}
            whole = straight(harness, flags(model, rows, place / f"ends-{number}-{batch}", **changes))
            expected = outcome(whole)

            def cell(step: int, whole: Path = whole, expected: dict = expected) -> bool:
                run = stopped_at(whole, step, place / f"{whole.name}-{step}")
                return go_on_and_compare(harness, run, expected)

            cells += harness.map(cell, range(5))
    return count("uneven ends", cells)


def chain(harness: Harness, model: Path, rows: Path, place: Path) -> tuple[int, int]:
    run = place / "chain"
    codes = [harness.run("finetune", flags(model, rows, run), kill_in_step=[1, 0])["code"]]
    for number in range(STEPS - 1):
        fault = [3, int(number % 4 != 2)]
        codes.append(harness.run("finetune_continue", {"output_path": run}, kill_in_step=fault)["code"])
    if set(codes) != {-signal.SIGKILL}:
        return count("chain", [False])
    return count("chain", [go_on_and_compare(harness, run, outcome(place / "whole-0"))])


def signals(
    harness: Harness, model: Path, rows: Path, place: Path, number: int, code: int
) -> tuple[int, int]:
    name = "SIGKILL" if code == -9 else "SIGTERM"
    expected = outcome(place / "whole-0")
    seconds = harness.run("finetune", flags(model, rows, place / f"clock-{name}"))["seconds"]
    generator = random.Random(SEED)
    hit = [0]

    def cell(item: tuple[int, float]) -> bool:
        run = place / f"{name}-{item[0]}"
        settings = flags(model, rows, run, save_steps=4)
        answer = harness.run("finetune", settings, signals=[[item[1], name]])
        hit[0] += answer["code"] == code
        if answer["code"] not in (0, code):
            return False
        if name == "SIGTERM" and list(run.glob("checkpoint-*")):  # the last finished step is saved
            logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
            if max(logged, default=0) != max(runs_folder.checkpoint_steps(run)):
                return False
        if not (run / "finetune_config.json").exists():  # it stopped before anything was written
            straight(harness, settings)
        return go_on_and_compare(harness, run, expected)

    moments = [(i, generator.uniform(0.02, 1.0) * seconds) for i in range(number)]
    cells = harness.map(cell, bar(moments, name))
    print(f"  {hit[0]} of {number} runs were still going when {name} came", flush=True)
    return count(name, cells)


def power_loss(place: Path) -> tuple[int, int]:
    (place / "power").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        good, total = power_failure.power_failures(place / "power", patch)
    print(f"power-loss states: {good} of {total}", flush=True)
    return good, total


def flips(place: Path, number: int) -> tuple[int, int]:
    run = place / "flips"
    run.mkdir()
    power_failure.save(run, 5)
    power_failure.save(run, 10)
    files, generator, cells = sorted((run / "checkpoint-10").iterdir()), random.Random(SEED), []
    for _ in range(number):
        path = generator.choice(files)
        good = path.read_bytes()
        path.write_bytes(flipped(good, generator))
        cells.append(runs_checkpoint.newest(run)[0] == run / "checkpoint-5")
        path.write_bytes(good)
    return count("flips", cells)


def flipped(content: bytes, generator: random.Random) -> bytes:
    raw = bytearray(content)
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    return bytes(raw)


def trainer_rows(model: Path, place: Path, kills: int) -> dict[str, tuple[int, int]]:
    """The same questions for the Trainer, each run a process of its own."""
    whole = place / "trainer"
    run_trainer(model, whole)
    expected = (whole / f"checkpoint-{STEPS}" / "adapter_model.safetensors").read_bytes()

    def goes_on(folder: Path, at: str) -> bool:
        result = run_trainer(model, folder, at)
        last = folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors"
        return result == 0 and last.is_file() and last.read_bytes() == expected

    def resumes(step: int) -> bool:
        folder = place / f"trainer-{step}"
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        return goes_on(folder, str(folder / f"checkpoint-{step}"))

    def survives(item: tuple[int, int]) -> bool:
        folder = place / f"trainer-kill-{item[0]}"
        run_trainer(model, folder, kill_in_step=item[1])
        return goes_on(folder, "last")

    def notices(item: tuple[int, int]) -> bool:
        generator, folder = random.Random(item[1]), place / f"trainer-flip-{item[0]}"
        for step in (5, 6):
            shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        path = generator.choice([p for p in sorted((folder / "checkpoint-6").iterdir()) if p.stat().st_size])
        path.write_bytes(flipped(path.read_bytes(), generator))
        return run_trainer(model, folder, "last") != 0

    generator = random.Random(SEED)
    places = [(number, generator.randint(1, STEPS)) for number in range(kills)]
    with ThreadPoolExecutor(2) as pool:
        resumed = count("Trainer, resumes", list(pool.map(resumes, range(1, STEPS))))
        killed = count("Trainer, SIGKILL", list(pool.map(survives, places)))
        noticed = count("Trainer, flips", list(pool.map(notices, places)))
    return {"T1": resumed, "T14": killed, "C8": noticed}


def run_trainer(model: Path, folder: Path, resume: str = "-", kill_in_step: int = 0) -> int:
    command = [sys.executable, "-m", "tests.training.resilience"]
    command += ["--trainer", str(model), str(folder), resume]
    environment = {**os.environ, "KILL_IN_STEP": str(kill_in_step)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=False).returncode


def train_with_trainer(model: str, folder: str, resume: str) -> None:
    """The Trainer's own way, in a process of its own; with KILL_IN_STEP it dies within that step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    torch.set_num_threads(1)
    torch.manual_seed(0)
    adapter = LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False), adapter)
    ids = [torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(i)) for i in range(20)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    at = int(os.environ.get("KILL_IN_STEP", "0"))

    class Kill(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if at and state.global_step + 1 == at:
                os.kill(os.getpid(), signal.SIGKILL)

    trainer = Trainer(
        model=adapted,
        args=arguments,
        train_dataset=[{"input_ids": x, "labels": x} for x in ids],
        callbacks=[Kill()],
    )
    there = any(Path(folder).glob("checkpoint-*")) if resume == "last" else resume != "-"
    trainer.train(resume_from_checkpoint=(True if resume == "last" else resume) if there else None)


def report(table: list[tuple[str, int, int]], theirs: dict[str, tuple[int, int]], seconds: float) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions().items())
    lines = [
        "# What stopping costs",
        "",
        f"{date.today().isoformat()}; {hardware.describe_machine()}; one thread a run; "
        f"{seconds / 60:.0f} minutes.",
        f"Python {sys.version.split()[0]}, {versions}.",
        "",
        "| | OneCard | transformers' Trainer |",
        "|---|---:|---:|",
    ]
    for title, good, total in table:
        key = title.rpartition("(")[2].rstrip(")")
        other = "{} / {}".format(*theirs[key]) if key in theirs else "-"
        lines.append(f"| {title} | {good} / {total} | {other} |")
    kills = next(total for title, _, total in table if "SIGKILL" in title)
    notes = f"""
No failure in {kills} kills means a failure rate below {100 * 3 / kills:.1f} % (95 %). The Trainer's kills
come between two micro-batches of a step, its flipped bits count as detected when it refuses to go on, and its
cells compare the adapter alone. Power-loss states are those of a model of a journalling file system
(tests/support/power_failure.py), not of a disk."""
    return "\n".join([*lines, notes]) + "\n"


if __name__ == "__main__":
    main()
