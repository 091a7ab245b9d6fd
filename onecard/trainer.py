"""The moving parts of a run, put together from its plan: base, adapter, optimizer, folder, journal."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onecard import checkpoint, hardware, memory, model, parallel, step
from onecard.checkpoint import Progress
from onecard.config import FinetuneConfig
from onecard.journal import Journal, say
from onecard.plan import Plan, lora_shape

FIRST_SCALE = 1024.0  # of the fp16 loss scaler: low, so that the first steps are not lost to overflows
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "numpy")


@dataclasses.dataclass
class Trainer:
    """The moving parts of a run."""

    plan: Plan
    step_model: step.StepModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    journal: Journal
    progress: Progress
    folder: Path
    budget: int  # tokens of a micro-batch

    @property
    def model(self) -> Any:
        return self.step_model.model


def load(plan: Plan, folder: Path) -> Trainer:
    """Base, adapter, optimizer, and the run folder with its configuration."""
    options = plan.options
    device = torch.device(plan.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    hardware.keep_large_memory_apart(plan.device)
    base = model.load_base(plan.base_path, options.bits, plan.dtype, plan.device)
    adapted = model.add_adapter(base, lora_shape(options), options.seed)
    say(f"adapter     {model.describe_adapter(adapted)}")
    budget = micro_batch_budget(plan, device)
    model.prepare_for_packed_training(adapted, plan.checkpointing)
    optimizer = make_optimizer(options, model.trainable(adapted))
    scaler = torch.amp.GradScaler(device.type, init_scale=FIRST_SCALE, enabled=plan.dtype == "fp16")
    scaler.scale(torch.zeros((), device=device))  # it wakes up here: a process may have no row in a step
    if parallel.is_main():
        start_folder(plan, folder, budget)
    parallel.barrier()
    shown = dataclasses.asdict(options) if options.wandb else None
    journal = Journal(
        folder, plan.total_steps, plan.total_rows, options.log_steps, shown, loud=parallel.is_main()
    )
    step_model = step.StepModel(adapted, model.DTYPES[plan.dtype])
    return Trainer(plan, step_model, optimizer, scaler, journal, Progress(), folder, budget)


def micro_batch_budget(plan: Plan, device: torch.device) -> int:
    """Tokens of a micro-batch: as asked, else max(2048, cutoff_len) on the CPU and what fits on a card."""
    options = plan.options
    if options.micro_batch_tokens != "auto":
        budget, reason = options.micro_batch_tokens, "asked for"
    elif device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        element = model.DTYPES[plan.dtype].itemsize
        fits = memory.tokens_that_fit(free, plan.base_config, element, plan.checkpointing)
        in_step = int(np.sort(plan.examples.lengths)[-options.batch_size :].sum())
        budget, reason = (
            max(options.cutoff_len, min(fits, in_step)),
            f"estimated to fit into {free / 2**30:.1f} GiB",
        )
    else:
        budget, reason = max(2048, options.cutoff_len), "auto on a CPU: max(2048, cutoff_len)"
    say(f"micro-batch {budget} tokens: {reason}; the gradient does not depend on it")
    return budget


def make_optimizer(options: FinetuneConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes

    kind = (
        bitsandbytes.optim.AdamW8bit
        if options.optimizer == "adamw_8bit"
        else bitsandbytes.optim.PagedAdamW8bit
    )
    return kind(parameters, **settings)


def start_folder(plan: Plan, folder: Path, budget: int) -> None:
    """Make the run folder: options, what auto became, what the rows were, and rejected rows."""
    try:
        checkpoint.clear(folder)  # asked for, or what a run left that stopped before its first step
        folder.mkdir(parents=True, exist_ok=True)
        if plan.rejected:
            lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in plan.rejected)
            text = "\n".join(lines) + "\n"
            (folder / checkpoint.REJECTED).write_text(text, encoding="utf-8", errors="backslashreplace")
            say(f"{len(plan.rejected)} rejected rows are in {folder / checkpoint.REJECTED}")
        resolved = {
            "base_path": plan.base_path,
            "device": plan.device,
            "dtype": plan.dtype,
            "gradient_checkpointing": plan.checkpointing,
            "micro_batch_tokens": budget,
            "processes": parallel.world_size(),
            "total_steps": plan.total_steps,
            "warmup_steps": plan.warmup_steps,
        }
        record = {
            "options": dataclasses.asdict(plan.options),
            "resolved": resolved,
            "data": plan.data_record,
            "versions": versions(),
        }
        checkpoint.write_json(folder / checkpoint.CONFIG, record)
    except OSError as error:
        raise checkpoint.disk_error(folder, error) from None


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
