"""Short trainings in this process, and run folders like those of a training."""

import dataclasses
import json
from pathlib import Path

from onecard.config.options import build
from onecard.config.training import FinetuneConfig
from onecard.inference import chat
from onecard.runs import folder as runs_folder
from onecard.training import loop, metrics
from tests.support import resume_cases

QUICK = {
    "bits": 16,
    "dtype": "fp32",
    "device": "cpu",
    "batch_size": 6,
    "num_epochs": 2,
    "learning_rate": 1e-2,
}


def options(model_path, data_path, output_path, **changes) -> FinetuneConfig:
    """The options of a run on the 24 rows of tiny.save_rows; changes: further options."""
    paths = {"model_path": str(model_path), "data_path": str(data_path), "output_path": str(output_path)}
    return build(
        FinetuneConfig, {**QUICK, "warmup_steps": 0, "test_size": 5, "eval_steps": 3, **paths, **changes}
    )


def fall(folder: Path) -> float:
    """The mean of the last five losses of a run, divided by the mean of the first five."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    return sum(losses[-5:]) / sum(losses[:5])


def short_reply(*arguments) -> list[str]:
    """chat.reply with answers of at most 6 tokens."""
    return chat.reply(*arguments[:-1], 6)


def trained(model, rows, folder, sample=short_reply, **changes) -> Path:
    """Train the run of resume_cases for 6 steps; returns its folder. changes: further options."""
    flags = resume_cases.flags(model, rows, folder, **{"max_steps": 6, **changes})
    settings = build(FinetuneConfig, {name: str(value) for name, value in flags.items()})
    loop.run(settings, sample=sample, draw=metrics.loss_curve)
    return folder


def planted(workspace: Path, name: str, steps: int = 3, **more) -> Path:
    """Write a run folder with a log and an empty checkpoint, like that of a training."""
    folder = workspace / name
    folder.mkdir(parents=True)
    stored = {"options": dataclasses.asdict(FinetuneConfig()), "resolved": {"total_steps": 5}, **more}
    (folder / runs_folder.CONFIG).write_text(json.dumps(stored))
    lines = [
        json.dumps({"step": n, "loss": 1.0 / n, "tokens": 10, "seconds": 2.0}) for n in range(1, steps + 1)
    ]
    (folder / runs_folder.LOG).write_text("".join(f"{line}\n" for line in lines))
    (folder / f"checkpoint-{steps}").mkdir()
    return folder
