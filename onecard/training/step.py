"""One optimizer step: rows in packed micro-batches -> gradient -> update.

The loss is the sum over target tokens divided by the target tokens of the whole step, over all processes;
how the rows were cut into micro-batches does not change it.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

from onecard.data.packing import PackedBatch
from onecard.errors import is_out_of_memory
from onecard.models import loss, trainable
from onecard.training import distributed


class NonFiniteError(Exception):
    """Loss or gradient is not a number; nothing was updated. Carries the raw value and the rows."""

    def __init__(self, what: str, value: float, rows: list[int]):
        super().__init__(f"the {what} is {value}")
        self.what, self.value, self.rows = what, value, rows


class StepModel(torch.nn.Module):
    """A causal language model seen as: packed rows -> (loss sum, number of targets, number of correct)."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, packs: bool = True):
        super().__init__()
        self.model, self.dtype = model, dtype
        self.packs = packs  # else a micro-batch is one row, and the model's own attention sees it

    def arithmetic(self) -> torch.autocast:
        """Trained weights, which are fp32, multiply in the run's dtype."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)

    def forward(self, packed: PackedBatch) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Loss sum (fp32 scalar), target tokens, and in eval mode how many are the most probable token."""
        base = trainable.base_of(self.model)
        places = {"position_ids": packed.position_ids, "document_lengths": packed.document_lengths}
        assert self.packs or len(packed.document_lengths) == 1
        with self.arithmetic():
            hidden = base.get_decoder()(
                input_ids=packed.input_ids,
                use_cache=False,  # with a cache, packed documents would see each other
                **(places if self.packs else {}),
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
    """Gradient of all rows of the step over all processes; returns the loss in nats per target token.

    micro_batches: this process's share, possibly empty; targets_in_step: over all processes. None means that
    a process ran out of memory: the partial gradient is dropped everywhere, and the same rows can be tried
    again in smaller micro-batches. Raises NonFiniteError.
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
    """Change the adapter by its gradient; returns (gradient norm, whether it was changed).

    The fp16 scaler leaves the update out when the gradient is not finite; without it that raises
    NonFiniteError before the update, naming `rows`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise NonFiniteError("gradient norm", norm, list(rows))
    scaler.step(optimizer)  # the fp16 scaler leaves the update out when a gradient is not finite,
    scaler.update()  # and halves its scale then
    return norm, math.isfinite(norm)


def _drop_gradient(parameters: list[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@torch.no_grad()
def evaluate(
    step_model: StepModel,
    micro_batches: Iterable[PackedBatch],
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
    total, correct, targets = distributed.sum_over_processes(sums.to(device)).tolist()
    return total / targets, correct / targets
