"""Run folders: names of their files, what of a folder is a run's own, and going back to an earlier step."""

import json
import os
import re
import shutil
from pathlib import Path

from onecard.hub.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from onecard.system import files as system_files
from onecard.system.files import PROBE

CONFIG, LOG, FINISHED, REJECTED = "finetune_config.json", "log.jsonl", "finished.json", "rejected_rows.jsonl"
SAMPLES = "samples.jsonl"
DROPPED, ASIDE = "log.dropped.jsonl", "set-aside-"
PICTURE = "loss.png"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights: the base stayed as it was
EXPORT = "export.json"  # of a folder of GGUF files: what it holds
MODEL = "model"  # when all was trained


def contents(folder: Path) -> list[Path]:
    """What a run has written into `folder`, or would write over."""
    found = [folder / f"checkpoint-{step}" for step in sorted(checkpoint_steps(folder))]
    names = (CONFIG, LOG, SAMPLES, FINISHED, REJECTED, PICTURE, ADAPTER_CONFIG, ADAPTER_WEIGHTS, DROPPED)
    found += [folder / name for name in names if (folder / name).exists()]
    if trained_all(folder) and (folder / MODEL).exists():
        found.append(folder / MODEL)
    if (folder / CONFIG).exists():  # otherwise these are not ours to name
        found += [*folder.glob("wandb"), *folder.glob(f"{ASIDE}*"), *leftovers(folder)]
    return found


def trained_all(folder: Path) -> bool:
    """Whether a run there trains all weights, so that `model` is its own."""
    try:
        return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["options"]["train_what"] == "full"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def leftovers(folder: Path) -> list[Path]:
    """What a save that was killed left behind."""
    ours = re.compile(r"\.(saving-(\d+|model)|replaced)-\d+|" + re.escape(PROBE) + r"\w+")
    return [path for path in folder.glob(".*-*") if ours.fullmatch(path.name)]


def has_log(folder: Path) -> bool:
    """Whether a run in `folder` got as far as its first evaluation or step."""
    log = folder / LOG
    return log.is_file() and log.stat().st_size > 0


def delete(paths: list[Path]) -> None:
    """Delete files and folders; a link goes, what it points to stays."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def go_back(folder: Path, step: int) -> list[str]:
    """Make a run folder look as it did after `step`; returns what was moved, in words.

    Later and damaged checkpoints are set aside first: until they are gone, they and not the log say where the
    run stands. The folder they go to need not appear whole: each of them is renamed as it is, and a kill in
    between leaves the others for the next time. What log and samples hold of later steps goes to
    log.dropped.jsonl. finished.json is deleted.
    """
    delete([path for path in (*leftovers(folder), folder / FINISHED) if path.exists() or path.is_symlink()])
    said = []
    later = [folder / f"checkpoint-{number}" for number in checkpoint_steps(folder) if number > step]
    if later:
        number = 1 + max([int(path.name.removeprefix(ASIDE)) for path in aside(folder)], default=0)
        place = folder / f"{ASIDE}{number}"
        place.mkdir()
        for path in sorted(later):
            path.rename(place / path.name)
        system_files.sync_folder(place)
        system_files.sync_folder(folder)
        said.append(f"{len(later)} later or damaged checkpoints are now in {place}")
    dropped = cut_log(folder, step) + cut_log(folder, step, SAMPLES)
    if dropped:
        said.append(f"{dropped} lines of later steps are now in {DROPPED}")
    return said


def aside(folder: Path) -> list[Path]:
    """Folders of checkpoints that were set aside."""
    return [path for path in folder.glob(f"{ASIDE}*") if path.name.removeprefix(ASIDE).isdecimal()]


def cut_log(folder: Path, step: int, name: str = LOG) -> int:
    """Keep the log's records up to `step`; returns how many were dropped, a line that a kill tore off too."""
    log = folder / name
    if not log.is_file():
        return 0
    kept, dropped = [], []
    for line in log.read_bytes().splitlines(keepends=True):
        (kept if _belongs(line, step) else dropped).append(line)
    if dropped:
        with open(folder / DROPPED, "ab") as file:
            file.write(b"".join(dropped).rstrip(b"\n") + b"\n")
            os.fsync(file.fileno())
        system_files.replace(log, b"".join(kept))
    return len(dropped)


def _belongs(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return known and record["step"] <= step and line.endswith(b"\n")


def checkpoint_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]
