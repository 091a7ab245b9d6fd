"""Run folders: what may be written where, atomic checkpoints, the finished adapter.

A checkpoint folder is a plain PEFT adapter plus what the trainer needs to go on. It is written beside its
place under another name, every file is synced, the manifest comes last, then the folder is renamed: a
checkpoint-<step> is whole or not there. No pickle anywhere.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from onecard.errors import CHECKPOINT, DISK, UserError

CONFIG, LOG, FINISHED, REJECTED = "finetune_config.json", "log.jsonl", "finished.json", "rejected_rows.jsonl"
PICTURE, ADAPTER_CONFIG, ADAPTER_WEIGHTS = "loss.png", "adapter_config.json", "adapter_model.safetensors"
MANIFEST, PROGRESS, OPTIMIZER = "manifest.json", "progress.json", "optimizer.safetensors"
FORMAT = 1


@dataclasses.dataclass
class Progress:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    updates: int = 0  # steps that changed the adapter; the learning rate follows these
    rows_seen: int = 0
    tokens: int = 0
    seconds: float = 0.0  # training only
    skipped_steps: int = 0  # by the fp16 scaler
    skipped_in_a_row: int = 0
    best_step: int = 0
    best_loss: float | None = None  # validation, nats per target token


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
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise UserError (exit 7) when `folder` cannot be written or less than needed_bytes are free."""
    parent = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    probe = parent / f".onecard-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
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
    names = (CONFIG, LOG, FINISHED, REJECTED, PICTURE, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    found += [folder / name for name in names if (folder / name).exists()]
    if (folder / CONFIG).exists():  # otherwise these are not ours to name
        found += [*folder.glob("wandb"), *folder.glob(".saving-*")]
    return found


def has_log(folder: Path) -> bool:
    """Whether a run in `folder` got as far as its first evaluation or step."""
    log = folder / LOG
    return log.is_file() and log.stat().st_size > 0


def clear(folder: Path) -> None:
    """Delete what a run wrote into `folder`; other files stay."""
    for path in contents(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def save(
    folder: Path,
    progress: Progress,
    save_adapter: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Path:
    """Write folder/checkpoint-<step>, whole or not at all; returns it. An existing one is left as it is."""
    target = folder / f"checkpoint-{progress.step}"
    if target.exists():
        verify(target)
        return target
    temporary = folder / f".saving-{progress.step}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        save_adapter(temporary)
        tensors, scalars = _optimizer_state(optimizer)
        save_file(tensors, temporary / OPTIMIZER)
        state = {
            "progress": dataclasses.asdict(progress),
            "optimizer": scalars,
            "scaler": scaler.state_dict(),
        }
        write_json(temporary / PROGRESS, state)
        write_json(temporary / MANIFEST, _manifest(temporary, progress.step))
        _sync_folder(temporary)
        temporary.rename(target)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise disk_error(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify(target)
    return target


def disk_error(path: Path, error: Exception) -> UserError:
    """What to say when writing failed; safetensors has an error of its own for a full disk."""
    problem = f"{path}: could not be written: {getattr(error, 'strerror', None) or error}."
    return UserError(problem, "Make room or check the rights; what was saved before is whole.", DISK)


def verify(checkpoint: Path) -> None:
    """Compare every file with the manifest; raises UserError (exit 4) naming the first that differs."""
    manifest = read_json(checkpoint / MANIFEST)
    if manifest is None:
        raise UserError(
            f"{checkpoint}: has no {MANIFEST}, so it is not whole.", "Use another checkpoint.", CHECKPOINT
        )
    for name, entry in manifest["files"].items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["bytes"] or _sha256(path) != entry["sha256"]:
            raise UserError(
                f"{path}: missing or changed since it was saved.", "Use another checkpoint.", CHECKPOINT
            )


def prune(folder: Path, keep: int | None, best_step: int) -> None:
    """Delete the oldest checkpoints beyond `keep`; never the newest or the best."""
    if keep is None:
        return
    steps = sorted(checkpoint_steps(folder))
    for step in steps[:-keep]:
        if step not in (best_step, steps[-1]):
            shutil.rmtree(folder / f"checkpoint-{step}")


def checkpoint_steps(folder: Path) -> list[int]:
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*") if path.is_dir()]
    return [int(name) for name in names if name.isdecimal()]


def publish(checkpoint: Path, folder: Path) -> str:
    """Copy the adapter of a verified checkpoint to the run folder; returns the SHA-256 of its weights."""
    verify(checkpoint)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        temporary = folder / f".{name}.tmp"
        shutil.copyfile(checkpoint / name, temporary)
        _sync_file(temporary)
        temporary.replace(folder / name)
    _sync_folder(folder)
    return _sha256(folder / ADAPTER_WEIGHTS)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors named <parameter>.<key>, everything that is not a tensor); nested states keep their path."""
    tensors, scalars = {}, {}

    def collect(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{path}.{key}" if path else str(key), inner)
        elif isinstance(value, torch.Tensor):
            tensors[path] = value.detach().cpu().contiguous().clone()
        else:
            scalars[path] = value

    collect("", optimizer.state_dict()["state"])
    return tensors, scalars


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    files = {}
    for path in sorted(folder.iterdir()):
        _sync_file(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return {"format": FORMAT, "step": step, "files": files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
