"""How far a merged model is from base + adapter, and from the quantised base the adapter was trained on.

One model is in memory at a time; of the merged one the logits stay, for the tokens that are compared.
"""

import gc
import math
from pathlib import Path

import torch

from onecard.config.tools import MergeConfig
from onecard.errors import CHECKPOINT, UserError
from onecard.evaluation import eval_rows
from onecard.evaluation.eval_rows import EvalRow
from onecard.models import adapter as models_adapter
from onecard.models import base_model
from onecard.runs.adapters import Adapter
from onecard.system import hardware
from onecard.system.console import say

UNMERGED = "base + adapter (peft)"


def run(options: MergeConfig, rows: list[EvalRow], base: Path, found: Adapter, merged: Path) -> None:
    """Say logit differences and perplexities on these rows; raises UserError, exit 4 for no numbers."""
    device = hardware.choose_device("auto").value
    dtype = hardware.choose_dtype("auto", device).value
    targets = sum(sum(is_target) for _, is_target in rows)
    say(f"report      {len(rows)} rows of {options.data_path}, {targets} target tokens, {dtype} on {device}")
    say(f"{'model':<30} {'perplexity':>10} {'ratio':>8} {'largest logit difference':>26}")
    first = outcome(_load(merged, 16, dtype, device, None), rows, device)
    say(f"{'merged':<30} {first[0]:>10.3f}")
    for kind in [16, *([found.bits] if found.bits in (4, 8) else [])]:
        name = UNMERGED if kind == 16 else f"{kind}-bit base + adapter"
        perplexity, logits = outcome(_load(base, kind, dtype, device, found.folder), rows, device)
        gap = largest_difference(first[1], logits)
        say(f"{name:<30} {perplexity:>10.3f} {perplexity / first[0]:>8.4f} {gap:>26.4f}")
        if not math.isfinite(gap):
            problem = f"{merged}: its logits and those of the {name} cannot be compared: some are no numbers."
            raise UserError(problem, "Delete the folder, and look for a damaged base or adapter.", CHECKPOINT)


def _load(folder: Path, bits: int, dtype: str, device: str, adapter_folder: Path | None) -> torch.nn.Module:
    made = base_model.load_base(str(folder), bits, dtype, device)
    if adapter_folder:
        made = models_adapter.attach(made, adapter_folder, "adapter")
        models_adapter.mix(made, {"adapter": 1.0})
    return made.eval()


def outcome(made: torch.nn.Module, rows: list[EvalRow], device: str) -> tuple[float, list[torch.Tensor]]:
    """(perplexity of the targets, logits [targets, V] of each row in fp32 that predict them)."""
    found = list(eval_rows.answers(made, rows, device))
    kept = [logits for logits, _ in found]
    del made
    gc.collect()  # the next model needs the room
    return eval_rows.per_token(sum(nats for _, nats in found), sum(map(len, kept))), kept


def largest_difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Over all targets and the tokens that both models have; NaN where one is no number."""
    pairs = zip(one, other, strict=True)
    gaps = [(a[:, : b.shape[1]] - b[:, : a.shape[1]]).abs().max() for a, b in pairs]
    return torch.stack(gaps).max().item()  # Python's own max() passes NaN over
