"""The interface of a strategy: how the processes of a run share its model and its steps.

With a replicated model every process has all of it; with a sharded one (FSDP and ZeRO) none has. All
processes of a run have the same strategy, and all of them call each method at the same point.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from onecard.data.examples import Examples
from onecard.data.packing import PackedBatch
from onecard.runs.checkpoint import SavedOptimizer
from onecard.training import sharded
from onecard.training.fsdp import Fsdp
from onecard.training.replicated import Replicated
from onecard.training.step import StepModel
from onecard.training.zero import Zero

MakeOptimizer = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Strategy(Protocol):
    """What replicated, FSDP and ZeRO training share."""

    has_whole_model: bool  # so one process alone can answer prompts
    redoes_steps: bool  # whether a step is repeated in smaller micro-batches when memory runs out
    optimizer: torch.optim.Optimizer  # of the parameters of this process; set by take()

    def start(self, device: torch.device) -> None:
        """Join the other processes."""

    def stop(self) -> None:
        """Leave the other processes."""

    def deferring_signals(self) -> AbstractContextManager[None]:
        """The context to train in: a signal may have to wait until all processes can stop."""

    def loads_on(self, device: str) -> str:
        """The device to load the base model on. device: the one to train on."""

    def for_activations(self, free_bytes: int) -> int:
        """How many of the bytes that are free after loading the activations of a micro-batch may use."""

    def take(self, step_model: StepModel, device: torch.device, make_optimizer: MakeOptimizer) -> None:
        """Take the model with its weights; shard it and print that, if this strategy does."""

    def level(self, share: list[PackedBatch], examples: Examples, row: int) -> list[PackedBatch]:
        """The micro-batches of this process, filled up to the same number where all processes need that.

        share: its own; row: index of any row, for those that are added, which have no targets.
        """

    def gradient(
        self,
        micro_batches: Iterable[PackedBatch],
        targets_in_step: int,
        scaler: torch.amp.GradScaler,
        progress: Callable[[int], None],
    ) -> float | None:
        """Compute the gradient of all rows of a step; returns the loss in nats per target token.

        targets_in_step: over all processes; progress: takes the number of rows of each micro-batch. Returns
        None when memory ran out and the step can be repeated. Raises NonFiniteError.
        """

    def update(self, scaler: torch.amp.GradScaler, rows: Sequence[int]) -> tuple[float, bool]:
        """Update the trained parameters; returns the gradient norm, and whether they changed.

        rows: numbers of the step's rows. Raises NonFiniteError with them.
        """

    def gather(self) -> tuple[dict[str, torch.Tensor] | None, SavedOptimizer]:
        """What a checkpoint saves: the parameters by name, or None when the model has them; the optimizer.

        They are complete in the main process only.
        """

    def optimizer_to_restore(self) -> SavedOptimizer:
        """The object that takes the optimizer state of a checkpoint."""

    def in_any(self, is_due: bool) -> bool:
        """Whether something that all processes must do together is due in one of them."""

    def stop_together(self) -> None:
        """Between two steps, raise Stopped in all processes when one of them has received a signal."""


STRATEGIES: dict[str | None, Callable[[float], Strategy]] = {
    None: Replicated,
    sharded.FSDP: Fsdp,
    sharded.DEEPSPEED: Zero,
}


def choose(max_grad_norm: float) -> Strategy:
    """The strategy that `accelerate launch` chose, else Replicated. max_grad_norm: 0 clips nothing."""
    return STRATEGIES[sharded.launched_kind()](max_grad_norm)
