"""Run folders: their files, what may be written where, and going back to an earlier step of a run.

Small files are whole or not there: written beside their place, synced, renamed.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, DISK, UserError

CONFIG, LOG, FINISHED, REJECTED = "finetune_config.json", "log.jsonl", "finished.json", "rejected_rows.jsonl"
SAMPLES = "samples.jsonl"
PROBE = ".onecard-"  # of what only shows whether there can be something
DROPPED, ASIDE = "log.dropped.jsonl", "set-aside-"
PICTURE, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "loss.png", "adapter_config.json", "adapter_model.safetensors"
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights: the base stayed as it was
EXPORT = "export.json"  # of a folder of GGUF files: what it holds
MODEL, MODEL_CONFIG, MODEL_WEIGHTS = "model", "config.json", "model.safetensors"  # when all was trained


def read_json(path: Path) -> dict[str, Any] | None:
    """Content of a JSON file of a run, None when there is none; raises UserError (exit 4) when damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path}: damaged ({error}).", "Use another --output_path, or --overwrite.", CHECKPOINT
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file so that it is whole or not there."""
    replace(path, (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise UserError (exit 7) when `folder` cannot be written or less than needed_bytes are free."""
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    try:
        tempfile.TemporaryFile(prefix=PROBE, dir=parent).close()  # without a name: a kill leaves nothing
    except OSError as error:
        raise UserError(
            f"--output_path {folder}: cannot write in {parent}: {error.strerror}.", "Choose another.", DISK
        ) from None
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise UserError(
            f"--output_path {folder}: the run needs about {needed_bytes >> 20} MiB, free: {free >> 20} MiB.",
            "Make room or choose another disk.",
            DISK,
        )


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
    run stands. What log and samples hold of later steps goes to log.dropped.jsonl. finished.json goes.
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
        sync_folder(folder)
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
        replace(log, b"".join(kept))
    return len(dropped)


def _belongs(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    known = isinstance(record, dict) and isinstance(record.get("step"), int)
    return known and record["step"] <= step and line.endswith(b"\n")


def evaluations(folder: Path) -> tuple[int, int, float | None]:
    """(step of the last evaluation or -1, step of the best one after step 0 or 0, its loss) from the log."""
    log = folder / LOG
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    found = [
        (r["step"], r["eval_loss"]) for r in map(json.loads, lines) if isinstance(r.get("eval_loss"), float)
    ]
    losses = [(loss, step) for step, loss in found if step > 0]
    loss, step = min(losses, default=(None, 0))
    return max([at for at, _ in found], default=-1), step, loss


def last_sampled(folder: Path) -> int:
    """Step of the last answers in samples.jsonl, -1 without any."""
    path = folder / SAMPLES
    lines = path.read_bytes().splitlines() if path.is_file() else []  # a text may hold other line ends
    return max((json.loads(line)["step"] for line in lines), default=-1)


def checkpoint_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [int(name) for name in names if name.isdecimal() and name == str(int(name))]


def disk_error(path: Path, error: Exception) -> UserError:
    """What to say when writing failed; safetensors has an error of its own for a full disk."""
    problem = f"{path}: could not be written: {getattr(error, 'strerror', None) or error}."
    return UserError(problem, "Make room or check the rights; what was saved before is whole.", DISK)


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
