"""What a LoRA adapter does to each tensor of its base, computed in fp32 a few rows at a time.

It reads peft's adapter_config.json and adapter_model.safetensors and knows no model: only names, shapes and
numbers. Formulas: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353). A is [r, in], B [out, r].
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from onecard.errors import CHECKPOINT, UserError
from onecard.hub import model_files
from onecard.models import tensor_files
from onecard.models.tensor_files import Files, Tensor
from onecard.runs import folder as run_folder
from onecard.system import files as system_files

PREFIX = "base_model.model."
CACHED = 1 << 19  # numbers in fp32 that fit into a core's own cache
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?P<rest>\..+)?")
PLAIN_VALUES = {  # settings of other kinds of adapters, and what they are in a plain one
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "use_bdlora": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
    "init_lora_weights": run_folder.PLAIN_STARTS,
}


@dataclasses.dataclass
class Change:
    """What happens to one module: where its low-rank pair lies, and its scale."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    scale: float
    bias: Tensor | None  # of B, [out]
    magnitude: Tensor | None  # DoRA's, [out]
    is_embedding: bool  # its weight is [in, out]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in (self.a, self.b, self.bias, self.magnitude) if tensor is not None]

    def shape(self, transposed: bool) -> tuple[int, int]:
        """Shape of the weight it belongs to; transposed: as Conv1D has it, [in, out]."""
        out, inside = self.b.shape[0], self.a.shape[1]
        return (inside, out) if transposed or self.is_embedding else (out, inside)


@dataclasses.dataclass
class Pair:
    """A change read into memory, in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    turned: bool  # the weight is [in, out]


@dataclasses.dataclass
class Adapter:
    """An adapter as its files have it: changes by module, and whole tensors that replace the base's."""

    changes: dict[str, Change]
    whole: dict[str, Tensor]
    config: dict[str, Any]


def read(folder: Path) -> Adapter:
    """Read an adapter; raises UserError (exit 4) with the list of what is missing, unknown or misshapen."""
    config = system_files.read_json(folder / model_files.ADAPTER_CONFIG) or {}
    if not isinstance(config, dict):
        problem = f"{folder / model_files.ADAPTER_CONFIG}: damaged (no JSON object)."
        raise UserError(problem, "Take another copy of the adapter.", CHECKPOINT)
    other = [name for name, plain in PLAIN_VALUES.items() if config.get(name, plain[0]) not in plain]
    if other:
        problem = f"{folder}: an adapter with {', '.join(f'{name} {config[name]}' for name in other)}."
        raise UserError(problem, "This kind cannot be merged by its numbers alone.", CHECKPOINT)
    try:
        found = tensor_files.of_file(folder / model_files.ADAPTER_WEIGHTS)
    except UserError as error:
        raise UserError(error.problem, "Take another copy of the adapter.", CHECKPOINT) from None
    # of a module that was trained whole peft may save the untrained one too
    untrained = [name for name in found if ".original_module." in name]
    for name in untrained:
        if name.replace(".original_module", "") in found:
            del found[name]
    strange = [name for name in found if not name.startswith(PREFIX)]
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in found.items():
        short = name.removeprefix(PREFIX)
        match = PART.fullmatch(short)
        if match:
            key = match["part"] + (".bias" if (match["rest"] or "").endswith(".bias") else "")
            parts.setdefault(match["module"], {})[key] = tensor
        else:
            whole[short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    bad = list(strange)
    changes = {}
    for module, held in parts.items():
        change = _change(module, held, config)
        if isinstance(change, str):
            bad.append(f"{module} ({change})")
        else:
            changes[module] = change
    if bad or not (changes or whole):
        raise wrong(folder, bad or ["no tensor at all"])
    return Adapter(changes, whole, config)


def wrong(folder: Path, names: list[str]) -> UserError:
    """The refusal, with the list of keys."""
    shown = "; ".join(sorted(names)[:20]) + (f"; and {len(names) - 20} more" if len(names) > 20 else "")
    problem = f"{folder}: {len(names)} tensors of the adapter do not fit: {shown}."
    return UserError(problem, "Give the --model_path it was made with.", CHECKPOINT)


def _change(module: str, held: dict[str, Tensor], config: dict[str, Any]) -> Change | str:
    """The change of one module, or what is wrong with its tensors."""
    is_embedding = "lora_embedding_A" in held or "lora_embedding_B" in held
    kind = "lora_embedding_" if is_embedding else "lora_"
    a, b = held.get(f"{kind}A"), held.get(f"{kind}B")
    if a is None or b is None:
        return f"lacks {kind}{'A' if a is None else 'B'}"
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"A {list(a.shape)} and B {list(b.shape)}, its rank is {rank}"
    if not rank or not isinstance(alpha, int | float):
        return f"its rank is {rank}, its alpha {alpha}"
    magnitude = held.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        return "lacks lora_magnitude_vector" if magnitude is None else "has a magnitude, use_dora is not set"
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Change(a, b, scale, held.get(f"{kind}B.bias"), magnitude, is_embedding)


def _pattern(patterns: dict[str, Any] | None, module: str, usual: Any) -> Any:
    """The value of the first pattern that matches the module's name or its end, as peft reads them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return usual


def load(files: Files, change: Change, transposed: bool, folder: Path) -> Pair:
    """Read a change; raises UserError (exit 4) when it holds something that is no number."""

    def value(tensor: Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        read = files.read(tensor, 0, tensor.rows).float()
        if not torch.isfinite(read).all():
            raise wrong(folder, [f"{tensor.name} (not finite)"])
        return read

    turned = transposed or change.is_embedding
    return Pair(value(change.a), value(change.b), change.scale, value(change.magnitude), turned)


def make_block(
    files: Files,
    source: Tensor,
    target: Tensor,
    pair: Pair | None,
    norms: torch.Tensor | None,
    bias: Change | None,
    first: int,
    last: int,
) -> None:
    """Read rows first..last of a tensor, change them, and write them; bias: the change that adds to it."""
    rows = files.read(source, first, last)
    if pair is not None:
        rows = merged(pair, rows, first, norms, target.dtype)
    if bias is not None:
        rows = rows.float() + files.read(bias.bias, first, last).float() * bias.scale
    files.write(target, first, rows.to(target.dtype))


def merged(
    pair: Pair, rows: torch.Tensor, first: int, norms: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of the merged weight from row `first` on, in `dtype`; norms: of norms_of.

    rows: the base's; they are written over when they have that dtype already.
    """
    made = rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
    for start, piece in _pieces(pair, rows, first):
        if norms is not None:
            factor = pair.magnitude / norms
            piece *= factor if pair.turned else factor[first + start : first + start + len(piece), None]
        made[start : start + len(piece)].copy_(piece)
    return made


def norms_of(pair: Pair, blocks: Iterable[tuple[int, torch.Tensor]]) -> torch.Tensor | None:
    """DoRA's norms [out] of the changed weight, over its inputs; None without DoRA.

    blocks: (first row, rows) of the base's weight.
    """
    if pair.magnitude is None:
        return None
    total = torch.zeros(pair.b.shape[0])
    for first, rows in blocks:
        for start, piece in _pieces(pair, rows, first):
            squares = piece.square_()
            if pair.turned:
                total += squares.sum(0)
            else:
                total[first + start : first + start + len(piece)] = squares.sum(1)
    return total.sqrt()


def _pieces(pair: Pair, rows: torch.Tensor, first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(row within rows, rows of base plus product in fp32), in memory that the next piece writes over.

    A few rows at a time: what stays in the processor's cache between the three passes over it costs half.
    """
    step = max(1, CACHED // rows.shape[1])
    space = torch.empty(min(step, len(rows)), rows.shape[1])
    for start in range(0, len(rows), step):
        last = min(start + step, len(rows))
        piece = space[: last - start].copy_(rows[start:last])
        which = slice(first + start, first + last)
        a, b = (pair.a[:, which].T, pair.b.T) if pair.turned else (pair.b[which], pair.a)
        yield start, piece.addmm_(a, b, alpha=pair.scale)
