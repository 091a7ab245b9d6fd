"""One optimizer step: the gradient of its rows, which come in packed micro-batches, and the update.

The loss is the sum over all target tokens divided by the number of target tokens of the whole step, over all
processes. So it does not depend on how the rows are cut into micro-batches.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from onecard.data.packing import PackedBatch
from onecard.errors import is_out_of_memory
from onecard.models import loss, trainable
from onecard.training import distributed


class NonFiniteError(Exception):
    """The loss or the gradient norm is not finite, and nothing was updated.

    what: "loss" or "gradient norm"; value: as it was computed; rows: numbers of the rows concerned.
    """

    def __init__(self, what: str, value: float, rows: list[int]):
        super().__init__(f"the {what} is {value}")
        self.what, self.value, self.rows = what, value, rows


class StepModel(torch.nn.Module):
    """A causal language model that turns packed rows into the sum of their losses, and into counts."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, packs: bool = True):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.packs = packs  # if not, each micro-batch is one row for the model's own attention

    def autocast(self) -> torch.autocast:
        """The context in which the trained weights, which are fp32, compute in the run's dtype."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, packed: PackedBatch) -> tuple[torch.Tensor, int, torch.Tensor]:
        """The sum of losses (fp32 scalar), the number of target tokens, and how many of them are predicted.

        The last is an int64 scalar: how often a target is the most probable token; 0 in training mode.
        """
        base = trainable.base_of(self.model)
        packing = {"position_ids": packed.position_ids, "document_lengths": packed.document_lengths}
        assert self.packs or len(packed.document_lengths) == 1
        with self.autocast():
            hidden = base.get_decoder()(
                input_ids=packed.input_ids,
                use_cache=False,  # with a cache, packed documents would see each other
                **(packing if self.packs else {}),
            ).last_hidden_state  # [1, T, H]
        predicting = hidden[0, packed.predicts].to(self.dtype)  # [N, H]
        head = base.get_output_embeddings()
        loss_sum, correct = loss.loss_and_correct(predicting, head, packed.targets, count=not self.training)
        return loss_sum, len(packed.targets), correct


def gradient(
    step_model: StepModel,
    micro_batches: Iterable[PackedBatch],
    targets_in_step: int,
    parameters: list[torch.nn.Parameter],
    scaler: torch.amp.GradScaler,
    progress: Callable[[int], None] = lambda rows: None,
) -> float | None:
    """Compute the gradient of the step's rows in all processes; returns the loss in nats per target token.

    micro_batches: of this process, possibly none; targets_in_step: target tokens in all processes; progress:
    takes the number of rows of each micro-batch. Returns None when a process ran out of memory: then no
    process has a gradient, and the same rows can be tried again in smaller micro-batches. Raises
    NonFiniteError.
    """
    total, bad_rows, enough = torch.zeros(1), [], True
    _drop_gradient(parameters)
    try:
        for packed in micro_batches:
            loss_sum, _, _ = step_model(packed)
            scaler.scale(loss_sum / targets_in_step).backward()
            total += loss_sum.detach().cpu()
            if not math.isfinite(loss_sum.item()):
                bad_rows.extend(packed.row_numbers)
            progress(len(packed.row_numbers))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        enough = False
    if not distributed.all_processes(enough):
        _drop_gradient(parameters)
        return None
    value = (distributed.sum_gradients(parameters, total.to(parameters[0].device)) / targets_in_step).item()
    if not math.isfinite(value):
        raise NonFiniteError("loss", value, distributed.gather_rows(bad_rows))
    return value


def update(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    rows: Sequence[int],
) -> tuple[float, bool]:
    """Update the trained parameters; returns the gradient norm before clipping, and whether they changed.

    max_grad_norm: 0 clips nothing; rows: numbers of the step's rows. When the gradient is not finite, the
    fp16 loss scaler skips the update; without a scaler NonFiniteError is raised before it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise NonFiniteError("gradient norm", norm, list(rows))
    scaler.step(optimizer)  # skips the update when a gradient is not finite
    scaler.update()  # and halves the loss scale then
    return norm, math.isfinite(norm)


def _drop_gradient(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def evaluate(
    step_model: StepModel,
    micro_batches: Iterable[PackedBatch],
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[float, float]:
    """Loss in nats per target token, and next-token accuracy (0 to 1), over the rows of all processes.

    micro_batches: of this process; progress: takes the number of rows of each.
    """
    step_model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, targets
    for packed in micro_batches:
        loss_sum, targets, correct = step_model(packed)
        sums += torch.tensor([loss_sum.item(), correct.item(), targets], dtype=torch.float64)
        progress(len(packed.row_numbers))
    step_model.train()
    device = next(step_model.parameters()).device
    total, correct, targets = distributed.sum_over_processes(sums.to(device)).tolist()
    return total / targets, correct / targets
