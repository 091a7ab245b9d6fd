"""The strategy for models that fit one GPU: every process has the whole model and a share of the rows.

One process alone works in the same way. Nothing wraps the model: the gradients of all processes are summed in
one buffer, so processes may have different micro-batches, and all of them repeat a step for which one ran out
of memory.
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch

from onecard.data.examples import Examples
from onecard.data.packing import PackedBatch
from onecard.models import trainable
from onecard.training import distributed, step


class Replicated:
    """Implements the Strategy of training/strategy.py."""

    has_whole_model = True
    redoes_steps = True
    optimizer: torch.optim.Optimizer

    def __init__(self, max_grad_norm: float):
        self.max_grad_norm = max_grad_norm

    def start(self, device: torch.device) -> None:
        distributed.start(device)

    def stop(self) -> None:
        distributed.stop()

    def deferring_signals(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()  # each process stops by itself

    def loads_on(self, device: str) -> str:
        return device

    def for_activations(self, free_bytes: int) -> int:
        return free_bytes  # a dry run lowers the budget before the first step

    def take(
        self,
        step_model: step.StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.step_model = step_model
        self.optimizer = make_optimizer(trainable.trainable(step_model.model))

    def level(self, share: list[PackedBatch], examples: Examples, row: int) -> list[PackedBatch]:
        return share

    def gradient(
        self,
        micro_batches: Iterable[PackedBatch],
        targets_in_step: int,
        scaler: torch.amp.GradScaler,
        progress: Callable[[int], None],
    ) -> float | None:
        parameters = trainable.trainable(self.step_model.model)
        return step.gradient(self.step_model, micro_batches, targets_in_step, parameters, scaler, progress)

    def update(self, scaler: torch.amp.GradScaler, rows: Sequence[int]) -> tuple[float, bool]:
        return step.update(self.optimizer, scaler, self.max_grad_norm, rows)

    def gather(self) -> tuple[None, torch.optim.Optimizer]:
        return None, self.optimizer

    def optimizer_to_restore(self) -> torch.optim.Optimizer:
        return self.optimizer

    def in_any(self, is_due: bool) -> bool:
        return is_due  # the main process saves alone

    def stop_together(self) -> None:
        """Do nothing: a signal has stopped this process already."""
