"""Atomic checkpoints: save, verify, restore and prune them, and publish the finished adapter.

A checkpoint folder is a plain PEFT adapter plus what the trainer needs to go on. It appears whole
(system/whole_folder.py): a checkpoint-<step> is complete or not there. It is written into a folder called
.saving-<step>-<pid> and not into whole_folder.stage: the run folder has a lock already, and every version of
OneCard deletes what is left under that name. No pickle anywhere.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from onecard.errors import CHECKPOINT, UserError
from onecard.hub.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG, MODEL_WEIGHTS
from onecard.runs.folder import MODEL, checkpoint_steps, delete
from onecard.system import safetensors as system_safetensors
from onecard.system import whole_folder
from onecard.system.files import check_room, disk_error, os_errors, put_file, write_json
from onecard.system.hashing import sha256

REPLACED = ".replaced-"
MANIFEST, PROGRESS, OPTIMIZER = "manifest.json", "progress.json", "optimizer.safetensors"
FORMAT = 1
IN_LOG = ("evaluated", "best_step", "best_loss")  # read from the log, not from checkpoints
ROOM_FOR_TEXT = 1 << 20  # bytes that the small files of a checkpoint need at most


@dataclasses.dataclass
class Progress:
    """Where a run stands after `step` optimizer steps."""

    step: int = 0
    updates: int = 0  # steps that changed the adapter; the learning rate follows these
    rows_seen: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training alone, without evaluations and saves
    skipped_steps: int = 0  # by the fp16 scaler
    skipped_in_a_row: int = 0
    answers: list[str] | None = None  # to the validation prompts, before the first step
    micro_batch_tokens: int = 0  # the budget; smaller than planned after running out of memory
    # these three come from the log, which may have an evaluation that is later than the checkpoint
    evaluated: int = -1  # step of the last evaluation
    best_step: int = 0
    best_loss: float | None = None  # validation, nats per target token


class SavedOptimizer(Protocol):
    """What this file needs of an optimizer: its whole state, in which parameters are numbered."""

    param_groups: list[dict[str, Any]]

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def save(
    folder: Path,
    progress: Progress,
    save_adapter: Callable[[Path], None],
    optimizer: SavedOptimizer,
    scaler: torch.amp.GradScaler,
) -> Path:
    """Write folder/checkpoint-<step>, whole or not at all; returns its path.

    A checkpoint that exists already with the same state is left as it is. One with another state is replaced:
    the rows were started anew, or the budget has changed. Raises UserError (exit 7) when the disk is full.
    """
    target = folder / f"checkpoint-{progress.step}"
    state = {k: v for k, v in dataclasses.asdict(progress).items() if k not in IN_LOG}
    if target.exists() and _same_state(verified_progress(target), progress):
        return target
    temporary = folder / f".saving-{progress.step}-{os.getpid()}"
    tensors, scalars = _optimizer_state(optimizer)
    adapter = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    check_room(folder, adapter + sum(tensor.nbytes for tensor in tensors.values()) + ROOM_FOR_TEXT)
    try:
        delete([path for path in [temporary] if path.exists() or path.is_symlink()])
        temporary.mkdir()
        with os_errors():
            save_adapter(temporary)
            save_file(tensors, temporary / OPTIMIZER)
        values = {"progress": state, "optimizer": scalars, "scaler": scaler.state_dict()}
        write_json(temporary / PROGRESS, values)
        replaced = folder / f"{REPLACED}{progress.step}"
        whole_folder.put(temporary, target, lambda: _write_manifest(temporary, progress.step), replaced)
        delete([replaced] if replaced.exists() else [])
    except OSError as error:
        raise disk_error(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    verify(target)
    return target


def verify(checkpoint: Path) -> list[str]:
    """Compare every file with the manifest; raises UserError (exit 4) naming the first that differs.

    Returns the names of files that the manifest does not list. They are not read.
    """

    def refuse(problem: str) -> UserError:
        return UserError(problem, "Use another checkpoint.", CHECKPOINT)

    try:
        text = (checkpoint / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text if text.endswith("\n") else "")  # so that a lost last byte is noticed
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        written, step = manifest["format"], manifest["step"]
    except FileNotFoundError:
        raise refuse(f"{checkpoint}: has no {MANIFEST}, so it is incomplete.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise refuse(f"{checkpoint / MANIFEST}: damaged ({error}).") from None
    if written != FORMAT:
        raise refuse(
            f"{checkpoint}: it has format {written}, but this version of OneCard reads format {FORMAT}."
        )
    whole = MODEL_WEIGHTS in files  # all weights were trained
    trained = {MODEL_CONFIG, MODEL_WEIGHTS} if whole else {ADAPTER_CONFIG, ADAPTER_WEIGHTS}
    missing = {*trained, OPTIMIZER, PROGRESS} - files.keys()
    if missing:
        raise refuse(f"{checkpoint / MANIFEST}: does not list {', '.join(sorted(missing))}.")
    for name, (size, digest) in files.items():
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != size or sha256(path) != digest:
            raise refuse(f"{path}: the file is missing, or was changed after it was saved.")
    numbered = re.fullmatch(r"checkpoint-\d+", checkpoint.name)
    if read_progress(checkpoint).step != step or (numbered and checkpoint.name != f"checkpoint-{step}"):
        raise refuse(f"{checkpoint}: its files say it is step {step}.")
    return sorted(path.name for path in checkpoint.iterdir() if path.name not in {*files, MANIFEST})


def finish_rename(folder: Path) -> None:
    """Give a checkpoint or the model its name back that a kill took between the two renames of `save`.

    It is for the program that goes on with the run: a program that only reads the run sees such a checkpoint
    through `newest`. Several processes of one run may call it at the same time.
    """
    for step, replaced in _unnamed(folder).items():
        with contextlib.suppress(FileNotFoundError):  # another process of the run was faster
            replaced.rename(folder / f"checkpoint-{step}")
    if not (folder / MODEL).exists():
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{REPLACED}{MODEL}").rename(folder / MODEL)


def _unnamed(folder: Path) -> dict[int, Path]:
    """Step -> checkpoint that was to be replaced and lost its name, where no other has the name."""
    steps = {path.name.removeprefix(REPLACED): path for path in folder.glob(f"{REPLACED}*")}
    paths = {int(step): path for step, path in steps.items() if step.isdecimal()}
    return {step: path for step, path in paths.items() if not (folder / f"checkpoint-{step}").exists()}


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run folder, or None; and what was wrong with newer ones.

    Nothing is changed. Where a kill cut a save in two, the path is that of a checkpoint without its name.
    """
    problems = []
    named = {step: folder / f"checkpoint-{step}" for step in checkpoint_steps(folder)}
    for _, path in sorted({**_unnamed(folder), **named}.items(), reverse=True):
        try:
            verify(path)
        except UserError as error:
            problems.append(error.problem)
        else:
            return path, problems
    return None, problems


def verified_progress(checkpoint: Path) -> Progress:
    """read_progress of a checkpoint that verify finds whole; raises UserError (exit 4)."""
    verify(checkpoint)
    return read_progress(checkpoint)


def _same_state(one: Progress, other: Progress) -> bool:
    """Whether two states of one step lead to the same next steps."""
    names = ("updates", "rows_seen", "micro_batch_tokens")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def read_progress(checkpoint: Path) -> Progress:
    """Where the run stood at a checkpoint; raises UserError (exit 4) when that cannot be read."""
    try:
        values = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))["progress"]
        names = [field.name for field in dataclasses.fields(Progress) if field.name not in IN_LOG]
        return Progress(**{name: values[name] for name in names})
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{checkpoint / PROGRESS}: damaged ({error})."
        raise UserError(problem, "Use another checkpoint.", CHECKPOINT) from None


def restore(checkpoint: Path, optimizer: SavedOptimizer, scaler: torch.amp.GradScaler) -> None:
    """Load the state of optimizer and scaler. models/trainable.py loads the weights that were trained."""
    state = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
    restore_optimizer(
        optimizer, {**system_safetensors.read_tensors(checkpoint / OPTIMIZER), **state["optimizer"]}
    )
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])


def restore_optimizer(optimizer: SavedOptimizer, flat: dict[str, Any]) -> None:
    """Load an optimizer state whose values are named <parameter's number>.<key>, as `save` writes them."""
    nested: dict[Any, Any] = {}
    for path, value in flat.items():
        number, *keys = path.split(".")
        inner = nested.setdefault(int(number), {})
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": nested, "param_groups": groups})


def prune(folder: Path, keep: int | None, best_step: int) -> None:
    """Delete the oldest checkpoints until `keep` are left, but never the newest or the best one.

    keep: None keeps all. best_step: 0 when there is no best one yet.
    """
    if keep is None:
        return
    steps = sorted(checkpoint_steps(folder))
    for step in steps[:-keep]:
        if step not in (best_step or steps[-1], steps[-1]):
            shutil.rmtree(folder / f"checkpoint-{step}")


def publish(checkpoint: Path, folder: Path) -> str:
    """Copy the trained weights of a checkpoint to the run folder; returns their SHA-256.

    An adapter goes beside the log, a whole model into a folder of its own. Raises UserError: exit 4 when the
    checkpoint is damaged, 7 when the disk is full.
    """
    verify(checkpoint)
    if (checkpoint / MODEL_WEIGHTS).is_file():
        return _publish_model(checkpoint, folder)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        temporary = folder / f".{name}.tmp"
        try:
            shutil.copyfile(checkpoint / name, temporary)
            put_file(temporary, folder / name)
        except OSError as error:
            raise disk_error(folder / name, error) from None
        finally:
            temporary.unlink(missing_ok=True)
    return sha256(folder / ADAPTER_WEIGHTS)


def _publish_model(checkpoint: Path, folder: Path) -> str:
    temporary, target = folder / f".saving-{MODEL}-{os.getpid()}", folder / MODEL
    own = shutil.ignore_patterns(MANIFEST, PROGRESS, OPTIMIZER)
    try:
        check_room(folder, (checkpoint / MODEL_WEIGHTS).stat().st_size)
        shutil.copytree(checkpoint, temporary, ignore=own)
        replaced = folder / f"{REPLACED}{MODEL}"
        delete([replaced] if target.exists() and replaced.exists() else [])
        whole_folder.put(temporary, target, replaced=replaced)
        delete([replaced] if replaced.exists() else [])
    except OSError as error:
        raise disk_error(target, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sha256(target / MODEL_WEIGHTS)


def _optimizer_state(optimizer: SavedOptimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors named <number of the parameter>.<key>, everything else under such names) of a nested state."""
    tensors, scalars, seen = {}, {}, set()
    for path, value in flattened(optimizer.state_dict()["state"]):
        if isinstance(value, torch.Tensor):
            tensor = value.detach().cpu().contiguous()
            shared = tensor.untyped_storage().data_ptr() in seen  # safetensors refuses shared memory
            tensors[path] = tensor.clone() if shared else tensor
            seen.add(tensor.untyped_storage().data_ptr())
        else:
            scalars[path] = value
    return tensors, scalars


def flattened(nested: dict[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(keys joined by dots, value) for each value in nested dictionaries; restore_optimizer undoes it."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _write_manifest(folder: Path, step: int) -> None:
    paths = sorted(folder.iterdir())
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})
