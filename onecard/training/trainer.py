"""Puts a run together from its plan: base model, adapter, optimizer, run folder and metric logger."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onecard.config import tools as config_tools
from onecard.config.training import FinetuneConfig
from onecard.hub import revisions
from onecard.models import base_model, trainable
from onecard.runs import folder as runs_folder
from onecard.runs import log as runs_log
from onecard.runs.checkpoint import Progress
from onecard.system import files as system_files
from onecard.system import gpus, hardware
from onecard.system import processes as system_processes
from onecard.system.console import say
from onecard.training import continued_plan, distributed, step
from onecard.training import memory as training_memory
from onecard.training.metrics import MetricLogger
from onecard.training.plan import Plan, versions
from onecard.training.starting_point import StartingPoint, restore, restore_weights
from onecard.training.strategy import Strategy

FIRST_SCALE = 1024.0  # of the fp16 loss scaler: low, so that the first steps do not overflow and get skipped


@dataclasses.dataclass
class Trainer:
    """The parts of a run that change while it trains."""

    plan: Plan
    step_model: step.StepModel
    strategy: Strategy
    scaler: torch.amp.GradScaler
    metrics: MetricLogger
    progress: Progress
    folder: Path
    sampled: int = -1  # step of the last answers in samples.jsonl, -1 before any
    saved: float = 0.0  # when the last checkpoint was written, in seconds of time.monotonic

    @property
    def model(self) -> torch.nn.Module:
        """The base model with its adapter."""
        return self.step_model.model

    @property
    def device(self) -> torch.device:
        """The device that this process trains on."""
        return torch.device(gpus.torch_name(self.plan.device))


def load(plan: Plan, folder: Path, strategy: Strategy, start: StartingPoint | None = None) -> Trainer:
    """Load the base model, make adapter and optimizer, and make or take back the run folder (start_folder).

    start: what the run continues from, None for a new one. Raises UserError when the weights cannot be loaded
    or the folder cannot be written.
    """
    options, device = plan.options, torch.device(gpus.torch_name(plan.device))
    if plan.device.startswith("cuda"):
        gpus.named(plan.device).select()
    hardware.keep_large_memory_apart(plan.device)
    stored_dtype = "fp32" if options.train_what == trainable.FULL else plan.dtype
    load_device = strategy.loads_on(plan.device)
    base = base_model.load_base(
        plan.base_path, options.bits, stored_dtype, load_device, to_train=True, code=plan.code
    )
    adapted = trainable.prepare(base, plan.shape, options.seed)
    version = None if Path(options.model_path).exists() else revisions.of(plan.base_path)
    if version and version.source == config_tools.HUB:  # peft looks it up on the hub
        trainable.note_base(adapted, version.name, version.commit)
    say(f"trained     {trainable.describe(adapted)}")
    packs = base_model.prepare_for_packed_training(adapted, plan.checkpointing)
    packed = "one causal call for each row of a packed micro-batch, without mask and padding"
    alone = "one row at a time, because this model's attention cannot be packed"
    say(f"attention   {packed if packs else alone}")
    if start:
        restore_weights(start, adapted)
    step_model = step.StepModel(adapted, base_model.DTYPES[plan.dtype], packs)
    strategy.take(step_model, device, functools.partial(make_optimizer, options))
    scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=plan.dtype == "fp16")
    scaler.scale(torch.zeros((), device=device))  # initialises it here: a process may have no row in a step
    progress = start.progress if start else Progress()
    if start:
        restore(start, adapted, strategy.optimizer_to_restore(), scaler)
    budget = (progress.micro_batch_tokens or micro_batch_budget(plan, strategy)) if packs else 1
    # the same in all processes, because they halve it together
    progress.micro_batch_tokens = distributed.smallest(budget)
    if system_processes.is_main():
        start_folder(plan, folder, progress, start)
    distributed.barrier()
    progress.evaluated, progress.best_step, progress.best_loss = runs_log.evaluations(folder)
    wandb_settings = dataclasses.asdict(options) if options.wandb else None
    total_rows = plan.rows_after(plan.total_steps - progress.step, progress.rows_seen)
    metrics = MetricLogger(
        folder,
        plan.total_steps,
        total_rows,
        options.log_steps,
        wandb_settings,
        loud=system_processes.is_main(),
    )
    if start and start.same_run and start.changes:
        metrics.event({"step": progress.step, "continued": start.changes})
    sampled = runs_log.last_sampled(folder)
    return Trainer(plan, step_model, strategy, scaler, metrics, progress, folder, sampled)


def micro_batch_budget(plan: Plan, strategy: Strategy) -> int:
    """Tokens of a micro-batch: as the option says; for auto max(2048, cutoff_len), or what fits on a GPU."""
    options = plan.options
    if options.micro_batch_tokens != "auto":
        budget, reason = int(options.micro_batch_tokens), "as asked for"
    elif plan.device.startswith("cuda"):
        gpu = gpus.named(plan.device)
        free = strategy.for_activations(gpu.free_bytes())
        element = base_model.DTYPES[plan.dtype].itemsize
        fits = training_memory.tokens_that_fit(free, plan.base_config, element, plan.checkpointing)
        largest_step = int(np.sort(plan.data.examples.lengths)[-options.batch_size :].sum())
        budget = max(options.cutoff_len, min(fits, largest_step))
        room = f"{free / 2**30:.1f} of the GPU's {gpu.total_bytes / 2**30:.1f} GiB"
        reason = f"estimated to fit into {room}"
        if fits < budget:
            reason = f"a row of --cutoff_len tokens, though only {fits} are estimated to fit into {room}"
    else:
        budget, reason = training_memory.tokens_on_cpu(options), "auto on a CPU: max(2048, cutoff_len)"
    say(f"micro-batch {budget} tokens: {reason}; the gradient does not depend on it")
    return budget


def make_optimizer(options: FinetuneConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, for these parameters."""
    learning_rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=decay)
    from bitsandbytes.optim import adamw

    kind = adamw.AdamW8bit if options.optimizer == "adamw_8bit" else adamw.PagedAdamW8bit
    return kind(parameters, lr=learning_rate, weight_decay=decay)


def start_folder(plan: Plan, folder: Path, progress: Progress, start: StartingPoint | None) -> None:
    """Make the run folder, or take it back to the step that the run continues from; write its options.

    Raises UserError (exit 7) when the folder cannot be written.
    """
    try:
        if start and start.same_run:
            for text in runs_folder.go_back(folder, progress.step if start.checkpoint else -1):
                say(text)
        else:
            runs_folder.delete(
                runs_folder.contents(folder)
            )  # --overwrite, or what a run that never began left
            system_files.make_folder(folder)
        # the consent to run code holds for one command, so it is not written
        options = {**dataclasses.asdict(plan.options), "remote_code": None}
        del options[runs_folder.MARKED_ROWS]  # it is in `resolved`
        resolved = {
            "base_path": plan.base_path,
            "base": _text(revisions.of(plan.base_path)),
            "template": plan.template.texts(),
            "device": plan.device,
            "dtype": plan.dtype,
            "gradient_checkpointing": plan.checkpointing,
            "micro_batch_tokens": progress.micro_batch_tokens,
            "processes": system_processes.world_size(),
            "threads": torch.get_num_threads(),
            "task": plan.data.task,
            **continued_plan.record(plan),
            **_beginning(progress, start),
            **_unknown_earlier(plan, start),
        }
        versions_of_rows = {revisions.of(file.path) for file in plan.data.files}
        rows = {
            "versions": sorted(str(version) for version in versions_of_rows if version),
            "train_rows": len(plan.data.train_rows),
            "validation_rows": len(plan.data.validation_rows),
            "cut": plan.data.encoding.cut,
            "dropped": plan.data.encoding.dropped,
            "rejected": len(plan.data.encoding.rejected),
        }
        record = {
            "options": options,
            "resolved": resolved,
            "data": rows,
            "fingerprints": plan.fingerprints,
            "begun_from": start.begun_from if start else None,
            "versions": versions(),
        }
        system_files.write_json(folder / runs_folder.CONFIG, record)
        if not (start and start.same_run and start.checkpoint):  # else they were written when the run began
            write_rejected(plan, folder)
    except OSError as error:
        raise system_files.disk_error(folder, error) from None


def _beginning(progress: Progress, start: StartingPoint | None) -> dict[str, int]:
    """The step at which a run began that took its weights from elsewhere: its log has no earlier step."""
    if start is None:
        return {}
    if not start.same_run:
        return {"begun_at": progress.step}
    resolved = start.stored["resolved"] if start.stored else {}
    return {"begun_at": resolved["begun_at"]} if "begun_at" in resolved else {}


def _unknown_earlier(plan: Plan, start: StartingPoint | None) -> dict[str, str]:
    """What earlier versions do not record, so that a run of theirs goes on without it."""
    values = {
        runs_folder.MARKED_ROWS: plan.options.marked_rows,
        "device_name": hardware.device_name(plan.device),
    }
    if not (start and start.same_run and start.stored):
        return values
    resolved = start.stored["resolved"]
    return {name: value for name, value in values.items() if name in resolved}


def _text(version: Any) -> str | None:
    return None if version is None else str(version)


def write_rejected(plan: Plan, folder: Path) -> None:
    """Write the rejected rows with their reasons to the run folder, if there are any."""
    rejected = plan.data.encoding.rejected
    if rejected:
        lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in rejected)
        text = "\n".join(lines) + "\n"
        content = text.encode("utf-8", errors="backslashreplace")
        system_files.replace(folder / runs_folder.REJECTED, content)
        say(f"{len(rejected)} rejected rows and the reasons are in {folder / runs_folder.REJECTED}")
