"""What FSDP and ZeRO have in common: which of them was launched, the options they refuse, a base class.

`accelerate launch` starts the processes with one of the files in sample/distributed/; fsdp.py and zero.py
shard the model. A step is still the sum over its rows. But all processes must run the model equally often, so
one with fewer micro-batches repeats one without its targets. A step that runs out of memory is not repeated.
"""

import abc
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from onecard.config.training import FinetuneConfig
from onecard.data.examples import Examples
from onecard.data.packing import PackedBatch, pack
from onecard.errors import Stopped, UserError
from onecard.system import processes as system_processes
from onecard.system import signals
from onecard.system.console import say
from onecard.training import distributed
from onecard.training.step import NonFiniteError, StepModel

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"
MARKS = {FSDP: "ACCELERATE_USE_FSDP", DEEPSPEED: "ACCELERATE_USE_DEEPSPEED"}  # set by accelerate launch
TRAINED = ("lora", "full")
ACTIVATIONS = 2  # they may use one of so many parts of the free memory: gradients and moments come later


def launched_kind() -> str | None:
    """FSDP or DeepSpeed if `accelerate launch` chose it; None when every process has the whole model."""
    return next((kind for kind, mark in MARKS.items() if os.environ.get(mark, "").lower() == "true"), None)


def check(options: FinetuneConfig, dtype: str) -> None:
    """Raise UserError for options that a sharded model cannot have. dtype: bf16, fp16 or fp32."""
    kind = launched_kind()
    if kind is None:
        return
    if options.bits != 16:
        problem = (
            f"{kind} cannot shard weights of {options.bits} bits: their scales are stored apart from them."
        )
        raise UserError(problem, "Add --bits 16, or use torchrun: each GPU then holds the whole base model.")
    if options.train_what not in TRAINED:
        problem = f"--train_what {options.train_what} is not possible with {kind}."
        raise UserError(problem, f"Choose {' or '.join(TRAINED)}, or use torchrun.")
    if options.optimizer != "adamw":
        raise UserError(
            f"--optimizer {options.optimizer} is not possible with {kind}.", "Use --optimizer adamw."
        )
    if kind == DEEPSPEED and dtype == "fp16":
        raise UserError("--dtype fp16 is not possible with DeepSpeed.", "Use --dtype bf16 or fp32, or FSDP.")
    if kind == FSDP and os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            "FSDP 1 is not supported.", "Write fsdp_version: 2 into the configuration of accelerate."
        )


class Sharded(abc.ABC):
    """What FSDP and ZeRO have in common; implements the Strategy of training/strategy.py."""

    has_whole_model = False
    redoes_steps = False
    model: torch.nn.Module  # the step model, or the library's wrapper of it
    named: dict[str, torch.nn.Parameter]  # the trained parameters by name
    optimizer: torch.optim.Optimizer
    description: str  # of how the model is sharded, for the user

    def __init__(self, max_grad_norm: float):
        self.max_grad_norm = max_grad_norm

    def start(self, device: torch.device) -> None:
        distributed.start(device, alone_too=True)

    def stop(self) -> None:
        distributed.stop()

    def deferring_signals(self) -> AbstractContextManager[None]:
        return signals.later()  # until stop_together

    def loads_on(self, device: str) -> str:
        return "cpu"  # from there it goes to the GPUs in parts

    def for_activations(self, free_bytes: int) -> int:
        return free_bytes // ACTIVATIONS

    def take(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.shard(step_model, device, make_optimizer)
        say(f"sharded     over {system_processes.world_size()} processes: {self.description}")

    @abc.abstractmethod
    def shard(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        """Shard the model, which is loaded on the CPU, over all processes."""

    @abc.abstractmethod
    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add to the gradient. last: whether this is the last micro-batch of the step."""

    @abc.abstractmethod
    def drop_gradient(self) -> None:
        """Delete the gradient of every parameter."""

    @abc.abstractmethod
    def step(self, scaler: torch.amp.GradScaler) -> float:
        """Update the trained parameters; returns the gradient norm before clipping."""

    @abc.abstractmethod
    def trained(self) -> dict[str, torch.Tensor]:
        """The whole trained parameters by name, on the main process's CPU; all processes must call it."""

    @abc.abstractmethod
    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The whole optimizer state of each parameter by its number, in the same way."""

    @abc.abstractmethod
    def set_optimizer_state(self, states: dict[int, dict[str, Any]]) -> None:
        """Restore what optimizer_state returned."""

    def level(self, share: list[PackedBatch], examples: Examples, row: int) -> list[PackedBatch]:
        """As many micro-batches as the process with the most; those that are added have no targets."""
        count = distributed.largest(len(share))
        batch = share[0] if share else pack(examples, [row])
        without_targets = dataclasses.replace(
            batch, predicts=batch.predicts[:0], targets=batch.targets[:0], row_numbers=()
        )
        return share + [without_targets] * (count - len(share))

    def gradient(
        self,
        micro_batches: Iterable[PackedBatch],
        targets_in_step: int,
        scaler: torch.amp.GradScaler,
        progress: Callable[[int], None],
    ) -> float:
        """Like step.gradient, with equally many micro-batches in every process. Raises NonFiniteError.

        Both libraries average the gradient over the processes, so the loss is multiplied by their number.
        """
        total, processes = torch.zeros(1), system_processes.world_size()
        bad_rows: list[int] = []
        batches = list(micro_batches)
        self.drop_gradient()
        for index, packed in enumerate(batches):
            loss_sum, _, _ = self.model(packed)
            last = index == len(batches) - 1
            self.backward(scaler.scale(loss_sum * (processes / targets_in_step)), last)
            total += loss_sum.detach().cpu()
            if not math.isfinite(loss_sum.item()):
                bad_rows.extend(packed.row_numbers)
            progress(len(packed.row_numbers))
        value = distributed.sum_over_processes(total.to(packed.input_ids.device)).item() / targets_in_step
        if not math.isfinite(value):
            raise NonFiniteError("loss", value, distributed.gather_rows(bad_rows))
        return value

    def update(self, scaler: torch.amp.GradScaler, rows: Sequence[int]) -> tuple[float, bool]:
        """Like step.update."""
        norm = self.step(scaler)
        if not math.isfinite(norm) and not scaler.is_enabled():
            raise NonFiniteError("gradient norm", norm, list(rows))
        return norm, math.isfinite(norm)

    def gather(self) -> tuple[dict[str, torch.Tensor], "GatheredOptimizer"]:
        trained = self.trained()
        return trained, GatheredOptimizer(self, trained)

    def optimizer_to_restore(self) -> "GatheredOptimizer":
        return GatheredOptimizer(self, {})

    def in_any(self, is_due: bool) -> bool:
        return bool(distributed.largest(is_due))  # every process has a part of the checkpoint

    def stop_together(self) -> None:
        if number := distributed.largest(signals.arrived() or 0):
            raise Stopped(number)


def on_main(value: Any) -> Any:
    """A tensor on the CPU in the main process, None in the others: they do not need the memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu() if system_processes.is_main() else None
    return value


class GatheredOptimizer:
    """A sharded optimizer as runs/checkpoint.py expects one: its whole state, parameters by number."""

    def __init__(self, shards: Sharded, trained: dict[str, torch.Tensor]):
        self.shards, self.state = shards, shards.optimizer_state()
        self.param_groups = [{"params": list(trained.values())}]

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shards.set_optimizer_state(state_dict["state"])
