"""How the processes of a run share its model and its steps: what loop, trainer and memory may know of it.

Replicated: every process has the whole model. Sharded (FSDP and ZeRO): none has. All processes of a run have
the same strategy, and every method below is called by all of them at the same point.
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

    has_whole_model: bool  # so that one process alone can answer prompts
    redoes_steps: bool  # in smaller micro-batches, when memory runs out in one of them
    optimizer: torch.optim.Optimizer  # of what this process has; there after take()

    def start(self, device: torch.device) -> None:
        """Join the other processes."""

    def stop(self) -> None:
        """Leave the other processes."""

    def deferring_signals(self) -> AbstractContextManager[None]:
        """Around the training, where a signal may have to wait until all processes can stop."""

    def loads_on(self, device: str) -> str:
        """The device that the base model is loaded on."""

    def for_activations(self, free_bytes: int) -> int:
        """Of the free memory after loading what micro-batches may plan with."""

    def take(self, step_model: StepModel, device: torch.device, make_optimizer: MakeOptimizer) -> None:
        """The model, loaded and with its weights; says how it is shared, where it is."""

    def level(self, share: list[PackedBatch], examples: Examples, row: int) -> list[PackedBatch]:
        """This process's micro-batches, and others without targets where all need as many; row: any one."""

    def gradient(
        self,
        micro_batches: Iterable[PackedBatch],
        targets_in_step: int,
        scaler: torch.amp.GradScaler,
        progress: Callable[[int], None],
    ) -> float | None:
        """Gradient of all rows of a step; the loss in nats per target token, None when memory ran out.

        progress: takes the rows of each micro-batch. Raises NonFiniteError.
        """

    def update(self, scaler: torch.amp.GradScaler, rows: Sequence[int]) -> tuple[float, bool]:
        """Change what is trained by its gradient: (gradient norm, whether it was changed).

        rows: numbers of the step's rows, for NonFiniteError.
        """

    def gather(self) -> tuple[dict[str, torch.Tensor] | None, SavedOptimizer]:
        """What a checkpoint saves: parameters by name (None: the model has them), and the optimizer.

        Only in the main process are they whole.
        """

    def optimizer_to_restore(self) -> SavedOptimizer:
        """What takes the state of a checkpoint's optimizer."""

    def in_any(self, is_due: bool) -> bool:
        """Whether something that all processes must do together is due; each says what its own clock says."""

    def stop_together(self) -> None:
        """Between two steps: raise Stopped in all processes when a signal waits in one of them."""


STRATEGIES: dict[str | None, Callable[[float], Strategy]] = {
    None: Replicated,
    sharded.FSDP: Fsdp,
    sharded.DEEPSPEED: Zero,
}


def choose(max_grad_norm: float) -> Strategy:
    """The strategy that `accelerate launch` asked for, else replicated; max_grad_norm: 0 clips nothing."""
    return STRATEGIES[sharded.wanted()](max_grad_norm)
