"""Micro-batches that fit: tried before the first step, and made smaller when memory runs out in one.

None of it changes the gradient.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from onecard.data.packing import pack
from onecard.errors import MEMORY, UserError, is_out_of_memory
from onecard.models import trainable
from onecard.system import hardware
from onecard.training import distributed, step
from onecard.training.plan import Plan
from onecard.training.trainer import Trainer


def halve_budget(trainer: Trainer, rows: NDArray[np.int64]) -> None:
    """Smaller micro-batches from now on; raises UserError (exit 6) when every row already stood alone."""
    progress = trainer.progress
    hardware.forget_cached_memory(trainer.plan.device)
    lengths = trainer.plan.data.examples.lengths[rows]
    if progress.micro_batch_tokens <= lengths.min():
        problem = f"Out of memory: a single row of {lengths.max()} tokens does not fit."
        fix = "Lower --cutoff_len or --bits, or use --gradient_checkpointing on, or a smaller model."
        raise UserError(problem, fix, MEMORY)
    before = progress.micro_batch_tokens
    progress.micro_batch_tokens = min(before, int(lengths.sum())) // 2
    now = f"now {progress.micro_batch_tokens}. The same rows are done again, with the same gradient"
    trainer.journal.say(f"out of memory with micro-batches of {before} tokens: {now}.")


def dry_run(trainer: Trainer) -> bool:
    """Find out before the first step whether the most expensive micro-batch fits; if not, lower the budget.

    Nothing else is changed. Returns whether the budget did fit.
    """
    planned = trainer.progress.micro_batch_tokens
    while trainer.strategy.redoes_steps:
        rows = fullest(trainer.plan, trainer.progress.micro_batch_tokens)
        packed = [pack(trainer.plan.data.examples, rows.tolist()).to(trainer.device)]
        spare = room_of_an_update(trainer)
        loss = None
        if distributed.all_processes(spare is not None):
            with torch.random.fork_rng(), trainable.without_casts(trainer.model):
                try:
                    loss = trainer.strategy.gradient(packed, 1, trainer.scaler, lambda rows: None)
                except step.NonFiniteError:  # the step that has these rows will tell
                    loss = math.nan
        trainer.strategy.optimizer.zero_grad(set_to_none=True)
        del spare
        hardware.release_free_memory(trainer.plan.device)
        if loss is not None:
            return trainer.progress.micro_batch_tokens == planned
        halve_budget(trainer, rows)
    return True


def room_of_an_update(trainer: Trainer) -> list[torch.Tensor] | None:
    """As much memory as the first update needs beside the gradient: AdamW's moments, unless they are there,
    and once what is trained. None when there is not as much."""
    made = []
    for parameter in trainable.trainable(trainer.model):
        moment = 1 if "8bit" in trainer.plan.options.optimizer else parameter.element_size()
        moments = 0 if trainer.strategy.optimizer.state.get(parameter) else 2 * moment
        count = parameter.numel() * (moments + parameter.element_size())
        try:
            made.append(torch.empty(count, dtype=torch.uint8, device=parameter.device))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None
    return made


def fullest(plan: Plan, budget: int) -> NDArray[np.int64]:
    """Rows of a micro-batch as large as any step can have: longest first, filled up to the budget."""
    lengths, room = plan.data.examples.lengths, budget
    rows: list[int] = []
    for row in plan.data.train_rows[np.argsort(-lengths[plan.data.train_rows], kind="stable")]:
        if lengths[row] <= room or not rows:
            rows.append(row)
            room -= lengths[row]
        if room <= 0 or len(rows) == plan.options.batch_size:
            break
    return np.array(rows)
