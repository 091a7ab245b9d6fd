"""Compares a merged model with base + adapter, and with the quantised base on which the adapter was trained.

Only one model is in memory at a time. For the tokens that are compared, the logits of the merged model are
kept.
"""

import gc
import math
from pathlib import Path

import torch

from onecard import errors
from onecard.config.conversion import MergeConfig
from onecard.errors import CHECKPOINT, UserError
from onecard.evaluation import eval_rows, likelihood
from onecard.evaluation.eval_rows import EvalRow
from onecard.models import adapter as models_adapter
from onecard.models import base_model
from onecard.runs.adapters import Adapter
from onecard.system import hardware, openmp
from onecard.system.console import say

UNMERGED = "base + adapter (peft)"


def run(options: MergeConfig, rows: list[EvalRow], base: Path, adapter: Adapter, merged: Path) -> None:
    """Print the perplexities on these rows and the largest differences of logits.

    base, merged: model folders. Raises UserError (exit 4) when a logit is not a number.
    """
    with errors.remedy("Leave --report out.", beside=True):
        device = hardware.choose_device("auto").value
    openmp.say_once(device)
    dtype = hardware.choose_dtype("auto", device).value
    targets = sum(sum(is_target) for _, is_target in rows)
    say(f"report      {len(rows)} rows of {options.data_path}, {targets} target tokens, {dtype} on {device}")
    say(f"{'model':<30} {'perplexity':>10} {'ratio':>8} {'largest logit difference':>26}")
    merged_outcome = outcome(_load(merged, 16, dtype, device, None), rows)
    say(f"{'merged':<30} {merged_outcome[0]:>10.3f}")
    for bits in [16, *([adapter.bits] if adapter.bits in (4, 8) else [])]:
        name = UNMERGED if bits == 16 else f"{bits}-bit base + adapter"
        perplexity, logits = outcome(_load(base, bits, dtype, device, adapter.folder), rows)
        gap = largest_difference(merged_outcome[1], logits)
        say(f"{name:<30} {perplexity:>10.3f} {perplexity / merged_outcome[0]:>8.4f} {gap:>26.4f}")
        if not math.isfinite(gap):
            problem = f"{merged}: the logits of this model or of the {name} hold values that are no numbers."
            fix = "Delete the folder, and look for damaged weights in the base model and in the adapter."
            raise UserError(problem, fix, CHECKPOINT)


def _load(folder: Path, bits: int, dtype: str, device: str, adapter_folder: Path | None) -> torch.nn.Module:
    model = base_model.load_base(str(folder), bits, dtype, device)
    if adapter_folder:
        model = models_adapter.attach(model, adapter_folder, "adapter")
        models_adapter.mix(model, {"adapter": 1.0})
    return model.eval()


def outcome(model: torch.nn.Module, rows: list[EvalRow]) -> tuple[float, list[torch.Tensor]]:
    """(perplexity of the target tokens, logits [targets, V] in fp32 that predict the targets of each row)."""
    answers = list(eval_rows.answers(model, rows))
    logits = [logits for logits, _ in answers]
    del model
    gc.collect()  # the next model needs the memory
    return likelihood.perplexity(sum(nats for _, nats in answers), sum(map(len, logits))), logits


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference of logits, over all targets and the tokens that both models have.

    It is NaN when a logit is.
    """
    pairs = zip(one, other, strict=True)
    gaps = [(a[:, : b.shape[1]] - b[:, : a.shape[1]]).abs().max() for a, b in pairs]
    return torch.stack(gaps).max().item()  # Python's own max() ignores NaN
