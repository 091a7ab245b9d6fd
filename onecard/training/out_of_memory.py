"""Finds micro-batches that fit: tries the largest before the first step, halves them when memory runs out.

Neither changes the gradient.
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
    """Use smaller micro-batches from now on. Raises UserError (exit 6) when each of them held a single row.

    rows: indices of the rows for which memory ran out.
    """
    progress = trainer.progress
    hardware.forget_cached_memory(trainer.plan.device)
    lengths = trainer.plan.data.examples.lengths[rows]
    if progress.micro_batch_tokens <= lengths.min():
        problem = f"Out of memory: a single row of {lengths.max()} tokens does not fit."
        fix = "Lower --cutoff_len or --bits, or use --gradient_checkpointing on, or a smaller model."
        raise UserError(problem, fix, MEMORY)
    before = progress.micro_batch_tokens
    progress.micro_batch_tokens = min(before, int(lengths.sum())) // 2
    trainer.metrics.say(
        f"out of memory with micro-batches of {before} tokens: now {progress.micro_batch_tokens} tokens. "
        "The step is repeated with the same rows and has the same gradient."
    )


def dry_run(trainer: Trainer) -> bool:
    """Try before the first step whether the most expensive micro-batch fits; lower the token budget if not.

    Changes nothing else. Returns whether the first budget fitted.
    """
    planned = trainer.progress.micro_batch_tokens
    while trainer.strategy.redoes_steps:
        rows = fullest(trainer.plan, trainer.progress.micro_batch_tokens)
        packed = [pack(trainer.plan.data.examples, rows.tolist()).to(trainer.device)]
        reserved = reserve_for_update(trainer)
        loss = None
        if distributed.all_processes(reserved is not None):
            with torch.random.fork_rng(), trainable.without_casts(trainer.model):
                try:
                    loss = trainer.strategy.gradient(packed, 1, trainer.scaler, lambda rows: None)
                except step.NonFiniteError:  # the step that has these rows will report it
                    loss = math.nan
        trainer.strategy.optimizer.zero_grad(set_to_none=True)
        del reserved
        hardware.release_free_memory(trainer.plan.device)
        if loss is not None:
            return trainer.progress.micro_batch_tokens == planned
        halve_budget(trainer, rows)
    return True


def reserve_for_update(trainer: Trainer) -> list[torch.Tensor] | None:
    """Allocate as much memory as the first update needs beside the gradient; None when there is not as much.

    That is AdamW's two moments, unless they exist, and a copy of the trained parameters.
    """
    tensors = []
    for parameter in trainable.trainable(trainer.model):
        moment = 1 if "8bit" in trainer.plan.options.optimizer else parameter.element_size()
        moments = 0 if trainer.strategy.optimizer.state.get(parameter) else 2 * moment
        count = parameter.numel() * (moments + parameter.element_size())
        try:
            tensors.append(torch.empty(count, dtype=torch.uint8, device=parameter.device))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return None
    return tensors


def fullest(plan: Plan, budget: int) -> NDArray[np.int64]:
    """Indices of rows that make the largest micro-batch of any step: the longest rows that fit the budget."""
    lengths, room = plan.data.examples.lengths, budget
    rows: list[int] = []
    for row in plan.data.train_rows[np.argsort(-lengths[plan.data.train_rows], kind="stable")]:
        if lengths[row] <= room or not rows:
            rows.append(row)
            room -= lengths[row]
        if room <= 0 or len(rows) == plan.options.batch_size:
            break
    return np.array(rows)
