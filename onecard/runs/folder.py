"""Run folders: the names of their files, which files are a run's own, and how a run goes back to a step."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from onecard.hub.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from onecard.system import files as system_files
from onecard.system.files import PROBE

CONFIG, LOG, FINISHED, REJECTED = "finetune_config.json", "log.jsonl", "finished.json", "rejected_rows.jsonl"
SAMPLES = "samples.jsonl"
DROPPED, ASIDE = "log.dropped.jsonl", "set-aside-"
PLOT = "loss.png"
WANDB = "wandb_run.json"  # the id of the run at Weights & Biases
# values of init_lora_weights that leave the base model as it was
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
EXPORT = "export.json"  # says what a folder of GGUF files holds
MARKED_ROWS = "marked_rows"  # an option that stands in `resolved`, where earlier versions ignore it
MODEL = "model"  # folder of the result when all weights were trained


def contents(folder: Path) -> list[Path]:
    """Everything that a run has written into `folder`, or would write over."""
    paths = [folder / f"checkpoint-{step}" for step in sorted(checkpoint_steps(folder))]
    names = (CONFIG, LOG, SAMPLES, FINISHED, REJECTED, PLOT, ADAPTER_CONFIG, ADAPTER_WEIGHTS, DROPPED, WANDB)
    paths += [folder / name for name in names if (folder / name).exists()]
    if trained_all(folder) and (folder / MODEL).exists():
        paths.append(folder / MODEL)
    if (folder / CONFIG).exists():  # otherwise files of these names are not ours
        paths += [*folder.glob("wandb"), *folder.glob(f"{ASIDE}*"), *leftovers(folder)]
    return paths


def trained_all(folder: Path) -> bool:
    """Whether the run in `folder` trains all weights, so that `model` belongs to it."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["options"]["train_what"] == "full"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def options_of(record: dict[str, Any]) -> dict[str, Any]:
    """The options that the record of a run holds; raises KeyError or TypeError when it is damaged."""
    resolved = record.get("resolved") or {}
    return {**record["options"], **{name: resolved[name] for name in (MARKED_ROWS,) if name in resolved}}


def leftovers(folder: Path) -> list[Path]:
    """The folders and files that a killed save has left behind."""
    ours = re.compile(r"\.saving-(\d+|model)-\d+|\.replaced-(\d+|model)|" + re.escape(PROBE) + r"\w+")
    return [path for path in folder.glob(".*-*") if ours.fullmatch(path.name)]


def has_log(folder: Path) -> bool:
    """Whether a run in `folder` got as far as its first evaluation or step."""
    log = folder / LOG
    return log.is_file() and log.stat().st_size > 0


def delete(paths: list[Path]) -> None:
    """Delete files and folders. Of a link only the link itself is deleted."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def go_back(folder: Path, step: int) -> list[str]:
    """Make a run folder look as it did after `step`; returns sentences that say what was moved.

    Later and damaged checkpoints are set aside first: until they are gone, they and not the log say where the
    run stands. The folder they go to need not appear whole: each of them is renamed as it is, and a kill in
    between leaves the others for the next time. What log and samples hold of later steps goes to
    log.dropped.jsonl. finished.json is deleted.
    """
    delete([path for path in (*leftovers(folder), folder / FINISHED) if path.exists() or path.is_symlink()])
    sentences = []
    later = [folder / f"checkpoint-{number}" for number in checkpoint_steps(folder) if number > step]
    if later:
        number = 1 + max([int(path.name.removeprefix(ASIDE)) for path in aside(folder)], default=0)
        place = folder / f"{ASIDE}{number}"
        place.mkdir()
        for path in sorted(later):
            path.rename(place / path.name)
        system_files.sync_folder(place)
        system_files.sync_folder(folder)
        sentences.append(f"{len(later)} later or damaged checkpoints are now in {place}")
    dropped = cut_log(folder, step) + cut_log(folder, step, SAMPLES)
    if dropped:
        sentences.append(f"{dropped} lines that are later or damaged are now in {DROPPED}")
    return sentences


def aside(folder: Path) -> list[Path]:
    """The folders in which checkpoints were set aside."""
    return [path for path in folder.glob(f"{ASIDE}*") if path.name.removeprefix(ASIDE).isdecimal()]


def cut_log(folder: Path, step: int, name: str = LOG) -> int:
    """Drop the lines of a log after `step`, and damaged ones; returns how many were dropped."""
    log = folder / name
    if not log.is_file():
        return 0
    remaining, dropped = [], []
    for line in log.read_bytes().splitlines(keepends=True):
        (remaining if _belongs(line, step) else dropped).append(line)
    if dropped:
        system_files.append(folder / DROPPED, b"".join(dropped).rstrip(b"\n") + b"\n")
        system_files.replace(log, b"".join(remaining))
    return len(dropped)


def _belongs(line: bytes, step: int) -> bool:
    record = record_of(line)
    return record is not None and record["step"] <= step


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line of a log, with its line end; None when the line was cut off or is damaged."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of all checkpoints in a run folder, whole or damaged, in no order."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]
