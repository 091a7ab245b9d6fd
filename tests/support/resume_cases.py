"""A small run that is stopped in many ways, and a comparison with a run that was never stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from onecard.runs import folder as runs_folder
from tests.support.harness import Harness

STEPS = 12
FLAGS = {
    "bits": 16,
    "dtype": "fp32",
    "device": "cpu",
    "batch_size": 6,
    "micro_batch_tokens": 150,  # three micro-batches a step
    "num_epochs": 3,  # 19 rows make 4 steps an epoch, the last with one row
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "lora_dropout": 0.1,
    "test_size": 5,
    "eval_steps": 3,
    "save_steps": 1,
    "lora_r": 4,
}
VARIANTS = {
    "16 bits": {},
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "8-bit optimizer": {"optimizer": "adamw_8bit", "lora_r": 48},  # smaller tensors keep 32-bit states
    "cosine, no validation": {"lr_scheduler": "cosine", "test_size": 0, "weight_decay": 0.1},
    "fp16 with its scaler": {"dtype": "fp16"},
}


def flags(model: Path, rows: Path, output: Path, **changes) -> dict:
    return {**FLAGS, "model_path": model, "data_path": rows, "output_path": output, **changes}


def straight_runs(harness: Harness, model: Path, rows: Path, place: Path) -> Callable[[str], Path]:
    """A function from the name of a variant to the folder of a run that was never stopped.

    Each run is made once.
    """
    folders: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in folders:
            folder = place / f"run-{len(folders)}"
            answer = harness.run("finetune", flags(model, rows, folder, **VARIANTS[variant]))
            assert answer["code"] == 0, answer["said"]
            folders[variant] = folder
        return folders[variant]

    return run


def outcome(run: Path) -> dict:
    """The parts that must be equal: adapters, last optimizer state, progress, and the log without times."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("seconds", None)
        record.pop("peak_memory_bytes", None)
    last = max(runs_folder.checkpoint_steps(run))
    state = json.loads((run / f"checkpoint-{last}" / "progress.json").read_text())
    state["progress"].pop("seconds")
    is_whole_model = (run / "model").is_dir()  # all weights were trained
    file = "model.safetensors" if is_whole_model else "adapter_model.safetensors"
    published = "model/" if is_whole_model else ""
    names = [f"{published}{file}", f"checkpoint-{last}/{file}", f"checkpoint-{last}/optimizer.safetensors"]
    return {"log": records, "state": state, **{name: (run / name).read_bytes() for name in names}}


def differences(one: dict, other: dict) -> list[str]:
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def stopped_at(source: Path, step: int, target: Path) -> Path:
    """Copy a run folder as it was right after saving `step`, with remains that a kill may leave."""
    target.mkdir()
    for name in ("finetune_config.json", "log.jsonl"):
        shutil.copy(source / name, target / name)
    for number in runs_folder.checkpoint_steps(source):
        if number <= step:
            shutil.copytree(source / f"checkpoint-{number}", target / f"checkpoint-{number}")
    with open(target / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 99, "lo')  # an incomplete line
    (target / ".saving-9-1").mkdir()
    return target
