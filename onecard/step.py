"""One optimizer step: rows in packed micro-batches -> gradient -> update.

The loss is the sum over target tokens divided by the target tokens of the whole step, over all processes;
how the rows were cut into micro-batches does not change it.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

from onecard import loss, parallel
from onecard.batching import PackedBatch


class NonFiniteError(Exception):
    """Loss or gradient is not a number; nothing was updated. Carries the raw value and the rows."""

    def __init__(self, what: str, value: float, rows: list[int]):
        super().__init__(f"the {what} is {value}")
        self.what, self.value, self.rows = what, value, rows


@dataclasses.dataclass(frozen=True)
class StepResult:
    """loss: nats per target token; updated is False when the fp16 scaler skipped the update."""

    loss: float
    grad_norm: float
    updated: bool


class StepModel(torch.nn.Module):
    """A causal language model seen as: packed rows -> (loss sum, number of targets, number of correct)."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, packed: PackedBatch) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Loss sum (fp32 scalar), target tokens, and in eval mode how many are the most probable token."""
        base = self.model.get_base_model()
        mixed = self.dtype != torch.float32  # the adapter's fp32 weights multiply in the base's dtype
        with torch.autocast(packed.input_ids.device.type, self.dtype, enabled=mixed):
            hidden = base.get_decoder()(
                input_ids=packed.input_ids,
                position_ids=packed.position_ids,
                document_lengths=packed.document_lengths,
                use_cache=False,  # with a cache, packed documents would see each other
            ).last_hidden_state  # [1, T, H]
        predicting = hidden[0, packed.predicts]  # [N, H]
        head = base.get_output_embeddings()
        loss_sum, correct = loss.loss_and_correct(predicting, head, packed.targets, count=not self.training)
        return loss_sum, len(packed.targets), correct


def optimizer_step(
    step_model: StepModel,
    micro_batches: list[PackedBatch],
    targets_in_step: int,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    max_grad_norm: float,
    progress: Callable[[int], None] = lambda rows: None,
) -> StepResult:
    """Gradient of all rows of the step, then one update; raises NonFiniteError before the update.

    micro_batches: this process's share, possibly empty; targets_in_step: over all processes.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.zero_grad(set_to_none=True)
    total, bad_rows = torch.zeros(1), []
    for packed in micro_batches:
        loss_sum, _, _ = step_model(packed)
        scaler.scale(loss_sum / targets_in_step).backward()
        total += loss_sum.detach().cpu()
        if not math.isfinite(loss_sum.item()):
            bad_rows.extend(packed.row_numbers)
        progress(len(packed.row_numbers))
    value = (parallel.sum_gradients(parameters, total.to(parameters[0].device)) / targets_in_step).item()
    if not math.isfinite(value):
        raise NonFiniteError("loss", value, parallel.gather_rows(bad_rows))

    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        mine = [row for packed in micro_batches for row in packed.row_numbers]
        raise NonFiniteError("gradient norm", norm, parallel.gather_rows(mine))
    scaler.step(optimizer)  # the fp16 scaler leaves the update out when a gradient is not finite,
    scaler.update()  # and halves its scale then
    return StepResult(value, norm, updated=math.isfinite(norm))


@torch.no_grad()
def evaluate(
    step_model: StepModel,
    micro_batches: list[PackedBatch],
    progress: Callable[[int], None] = lambda rows: None,
):
    """(loss in nats per target token, next-token accuracy) over all processes' micro-batches."""
    step_model.eval()
    sums = torch.zeros(3, dtype=torch.float64)  # loss, correct, targets
    for packed in micro_batches:
        loss_sum, targets, correct = step_model(packed)
        sums += torch.tensor([loss_sum.item(), correct.item(), targets], dtype=torch.float64)
        progress(len(packed.row_numbers))
    step_model.train()
    device = next(step_model.parameters()).device
    total, correct, targets = parallel.sum_over_processes(sums.to(device)).tolist()
    return total / targets, correct / targets
