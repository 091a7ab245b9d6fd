"""Where a run starts: from a checkpoint, from weights alone, or not at all, since it is finished.

Start holds what an earlier run gives; restore_weights and restore put it into model, optimizer and scaler.
finished_before compares the options with a finished run in the folder, and say_finished says the ways on.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from onecard import errors
from onecard.config import options as config_options
from onecard.config.training import FinetuneConfig
from onecard.data import dataset, reader
from onecard.errors import CHECKPOINT, UserError
from onecard.models import trainable
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as run_folder
from onecard.runs import legacy
from onecard.runs.checkpoint import Progress
from onecard.system import commands, lock
from onecard.system import files as system_files
from onecard.system.console import say

STARTING = "starting adapter"  # a fingerprint


@dataclasses.dataclass
class Start:
    """Where a run starts that is not simply new."""

    options: FinetuneConfig
    progress: Progress
    checkpoint: Path | None = None  # adapter, optimizer and scaler; None: from the seed
    adapter: dict[str, torch.Tensor] | None = None  # weights alone
    moments: dict[str, Any] | None = None  # of an older checkpoint's optimizer, flat
    scale: float | None = None  # of its fp16 loss scaler
    planned_steps: int | None = None  # of its schedule
    stored: dict[str, Any] | None = None  # finetune_config.json of the run whose schedule goes on
    same_run: bool = False  # in its own folder
    fingerprint: str | None = None  # of the weights alone that it starts with
    begun_from: str | None = None  # what a new run takes its adapter from
    base: str | None = None  # that this adapter was made with: owner/name@COMMIT
    changes: list[str] = dataclasses.field(default_factory=list)


def restore_weights(start: Start, adapted: Any) -> None:
    """Give what is trained the values it had."""
    if start.checkpoint is not None:
        trainable.load(adapted, start.checkpoint)
    elif start.adapter is not None:
        trainable.assign(adapted, start.adapter, "the adapter", start=True)


def restore(start: Start, adapted: Any, optimizer: Any, scaler: Any) -> None:
    """Give optimizer and scaler the state they had."""
    if start.checkpoint is not None:
        runs_checkpoint.restore(start.checkpoint, optimizer, scaler)
    if start.moments is not None:
        restore_moments(start.moments, trainable.trainable(adapted), optimizer)
    if start.scale is not None and scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), "scale": start.scale})


def restore_moments(
    moments: dict[str, Any], parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Load an older optimizer state where it fits; else the optimizer starts fresh, which is said.

    Both programs number the parameters in the model's order.
    """
    firsts = [legacy.first_moment(moments, number) for number in range(len(parameters))]
    fits = legacy.first_moment(moments, len(parameters)) is None and all(
        first is not None and first.shape == parameter.shape
        for first, parameter in zip(firsts, parameters, strict=True)
    )
    ours = isinstance(optimizer, torch.optim.AdamW)
    if fits and legacy.is_bitsandbytes(moments) != ours:
        runs_checkpoint.restore_optimizer(optimizer, moments)
    else:
        say("warning: the optimizer's state does not fit this adapter or --optimizer: it starts fresh.")


def finished_before(options: FinetuneConfig, folder: Path, weights_print: str | None = None) -> bool:
    """Whether this very run is finished; raises UserError when the folder holds another or an unfinished.

    weights_print: fingerprint of the weights of --lora_path.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_path {folder}: this is a file.", "Name a folder.")
    with errors.remedy("Wait for it, stop it, or choose another --output_path."):
        lock.check_free(folder)
    whole = options.train_what == trainable.FULL
    if whole and (folder / run_folder.MODEL).exists() and not run_folder.trained_all(folder):
        problem = f"{folder} holds {run_folder.MODEL}/, which did not come from a run."
        raise UserError(problem, "Choose another --output_path.")
    if options.overwrite:
        return False
    ways = "Choose another --output_path, or start anew with --overwrite."
    stored = system_files.read_json(folder / run_folder.CONFIG, ways)
    if stored is None:
        found = run_folder.contents(folder)
        if found:
            raise UserError(f"{folder} holds {found[0].name}, which this run would write over.", ways)
        return False
    try:
        before = {**dataclasses.asdict(FinetuneConfig()), **stored["options"]}  # options that came later
    except (KeyError, TypeError):
        problem = f"{folder / run_folder.CONFIG}: damaged (no options)."
        raise UserError(problem, ways, CHECKPOINT) from None
    learned = [
        name for name, role in config_options.roles(FinetuneConfig).items() if role == config_options.LEARNED
    ]
    now = dataclasses.asdict(options)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in learned if before[name] != now[name]]
    if changed:
        raise UserError(f"{folder} holds a run with other options: {'; '.join(changed)}.", ways)
    finished = system_files.read_json(folder / run_folder.FINISHED, ways)
    if finished is None:
        steps = run_folder.checkpoint_steps(folder)
        if not steps and not run_folder.has_log(folder):
            return False  # it stopped before its first step: nothing is lost by starting
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
    """The fingerprint of the rows as they are; rows that are gone have not changed."""
    try:
        validation = reader.locate_validation_files(options.eval_data_path)
        return dataset.fingerprint_of([*reader.locate_files(options.data_path), *validation])
    except UserError:
        return before


def say_finished(folder: Path, finished: dict[str, Any]) -> None:
    """Say that a run is finished, where its adapter is, and the ways on."""
    loss = finished["eval_loss_after"]
    say(
        f"This run is finished: {finished['steps']} steps"
        + (f", validation loss {loss:.4f}." if loss is not None else ".")
    )
    say(f"What was trained is in {folder}, with the log {run_folder.LOG} and the picture loss.png.")
    say(f"To train it longer: {commands.name('continue')} with a larger --num_epochs.")
    say("To train it again: --overwrite. To train another: other --output_path, --data_path, --model_path.")
