"""Where a run starts that is not simply new, and how its parts get their state."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from onecard import checkpoint, legacy, weights
from onecard.checkpoint import Progress
from onecard.config import FinetuneConfig
from onecard.journal import say


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
        weights.load(adapted, start.checkpoint)
    elif start.adapter is not None:
        weights.assign(adapted, start.adapter, "the adapter", start=True)


def restore(start: Start, adapted: Any, optimizer: Any, scaler: Any) -> None:
    """Give optimizer and scaler the state they had."""
    if start.checkpoint is not None:
        checkpoint.restore(start.checkpoint, optimizer, scaler)
    if start.moments is not None:
        restore_moments(start.moments, weights.trainable(adapted), optimizer)
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
        checkpoint.restore_optimizer(optimizer, moments)
    else:
        say("warning: the optimizer's state does not fit this adapter or --optimizer: it starts fresh.")
