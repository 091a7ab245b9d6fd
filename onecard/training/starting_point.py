"""The point that a run starts from: a checkpoint, or the weights of an adapter alone.

A StartingPoint holds what comes from an earlier run; restore_weights and restore put it into model, optimizer
and scaler. finished_before tells whether the folder holds this very run, finished; say_finished says what the
user can do then.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from onecard import errors
from onecard.config import declaration
from onecard.config.training import FinetuneConfig
from onecard.data import dataset, reader
from onecard.errors import CHECKPOINT, UserError
from onecard.models import trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy
from onecard.runs.checkpoint import Progress
from onecard.system import commands, lock
from onecard.system import files as system_files
from onecard.system.console import say

STARTING = "starting adapter"  # key of its fingerprint
BUSY = "Wait for it, stop it, or choose another --output_path."


@dataclasses.dataclass
class StartingPoint:
    """What a run starts from that is not entirely new."""

    options: FinetuneConfig
    progress: Progress
    checkpoint: Path | None = None  # with adapter, optimizer and scaler
    adapter: dict[str, torch.Tensor] | None = None  # weights, where there is no checkpoint
    moments: dict[str, Any] | None = None  # optimizer state of an older checkpoint, flat
    scale: float | None = None  # loss scale of an older checkpoint
    planned_steps: int | None = None  # steps that an older checkpoint's schedule was planned for
    next_rate: float | None = None  # learning rate with which an older checkpoint would go on
    stored: dict[str, Any] | None = None  # finetune_config.json of the run whose schedule continues
    same_run: bool = False  # whether the run continues in its own folder
    fingerprint: str | None = None  # SHA-256 of the weights in `adapter`
    begun_from: str | None = None  # the checkpoint or adapter that a new run takes its weights from
    base: str | None = None  # base model of that adapter: owner/name@COMMIT
    changes: list[str] = dataclasses.field(default_factory=list)  # from the run before, for the user


def restore_weights(start: StartingPoint, adapted: Any) -> None:
    """Give the trained parameters their earlier values. Raises UserError when they do not fit."""
    if start.checkpoint is not None:
        trainable.load(adapted, start.checkpoint)
    elif start.adapter is not None:
        trainable.assign(adapted, start.adapter, "the adapter", start=True)


def restore(start: StartingPoint, adapted: Any, optimizer: Any, scaler: Any) -> None:
    """Give optimizer and loss scaler their earlier state."""
    if start.checkpoint is not None:
        runs_checkpoint.restore(start.checkpoint, optimizer, scaler)
    if start.moments is not None:
        restore_moments(start.moments, trainable.trainable(adapted), optimizer)
    if start.scale is not None and scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), "scale": start.scale})


def restore_moments(
    moments: dict[str, Any], parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Load the optimizer state of an older checkpoint, or say that it does not fit and starts fresh.

    Both programs number the parameters in the order of the model.
    """
    firsts = [legacy.first_moment(moments, number) for number in range(len(parameters))]
    fits = legacy.first_moment(moments, len(parameters)) is None and all(
        first is not None and first.shape == parameter.shape
        for first, parameter in zip(firsts, parameters, strict=True)
    )
    is_torch_adamw = isinstance(optimizer, torch.optim.AdamW)
    if fits and legacy.is_bitsandbytes(moments) != is_torch_adamw:
        runs_checkpoint.restore_optimizer(optimizer, moments)
    else:
        say("warning: the optimizer's state does not fit this adapter or --optimizer: it starts fresh.")


def finished_before(options: FinetuneConfig, folder: Path, weights_print: str | None = None) -> bool:
    """Whether the folder holds this very run, finished; that is printed then.

    weights_print: SHA-256 of the weights of --lora_path. Raises UserError when the folder holds another run,
    an unfinished one, or files that this run would overwrite.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_path {folder}: this is a file.", "Name a folder.")
    with errors.remedy(BUSY):
        lock.check_free(folder)
    whole = options.train_what == trainable.FULL
    if whole and (folder / runs_folder.MODEL).exists() and not runs_folder.trained_all(folder):
        problem = f"{folder} holds {runs_folder.MODEL}/, which did not come from a run."
        raise UserError(problem, "Choose another --output_path.")
    if options.overwrite:
        return False
    ways = "Choose another --output_path, or start anew with --overwrite."
    stored = system_files.read_json(folder / runs_folder.CONFIG, ways)
    if stored is None:
        contents = runs_folder.contents(folder)
        if contents:
            raise UserError(f"{folder} holds {contents[0].name}, which this run would overwrite.", ways)
        return False
    try:
        # options that came with a later version have their defaults
        before = {**dataclasses.asdict(type(options)()), **runs_folder.options_of(stored)}
    except (KeyError, TypeError):
        problem = f"{folder / runs_folder.CONFIG} is damaged: it has no options."
        raise UserError(problem, ways, CHECKPOINT) from None
    learned = declaration.names(type(options), lambda option: option.role == declaration.LEARNED)
    now = dataclasses.asdict(options)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in learned if before[name] != now[name]]
    if changed:
        raise UserError(f"{folder} holds a run with other options: {'; '.join(changed)}.", ways)
    finished = system_files.read_json(folder / runs_folder.FINISHED, ways)
    if finished is None:
        steps = runs_folder.checkpoint_steps(folder)
        if not steps and not runs_folder.has_log(folder):
            return False  # it stopped before its first step, so starting loses nothing
        at = f"saved up to step {max(steps)}" if steps else "with nothing saved"
        go_on = f"Continue it: {commands.line('continue')} --output_path {folder}"
        raise UserError(f"{folder} holds an unfinished run, {at}.", f"{go_on} Or: {ways}")
    prints = stored.get("fingerprints", {})
    if weights_print and prints.get(STARTING, weights_print) != weights_print:
        raise UserError(f"{folder} holds a finished run, and {options.lora_path} has changed since.", ways)
    before_rows = prints.get("rows")
    if before_rows and before_rows != _rows_now(options, before_rows):
        problem = f"{folder} holds a finished run, and {options.data_path} has changed since."
        raise UserError(problem, ways)
    say_finished(folder, finished)
    return True


def _rows_now(options: FinetuneConfig, before: str) -> str:
    """The fingerprint of the rows as they are now; `before` when they are no longer there."""
    try:
        validation = reader.locate_validation_files(options.eval_data_path)
        return dataset.fingerprint_of([*reader.locate_files(options.data_path), *validation])
    except UserError:
        return before


def say_finished(folder: Path, finished: dict[str, Any]) -> None:
    """Print that a run is finished, where its result is, and what the user can do next."""
    loss = finished["eval_loss_after"]
    say(
        f"This run is finished: {finished['steps']} steps"
        + (f", validation loss {loss:.4f}." if loss is not None else ".")
    )
    say(f"The result is in {folder}, with the log {runs_folder.LOG} and the plot {runs_folder.PLOT}.")
    say(f"To train it longer, use {commands.name('continue')} with a larger --num_epochs.")
    say("To train it again, add --overwrite. For another run, give another --output_path.")
