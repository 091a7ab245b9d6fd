"""How a LoRA adapter changes each tensor of its base model, computed in fp32 a few rows at a time.

It reads adapter_config.json and adapter_model.safetensors as peft writes them. It knows no model, only names,
shapes and numbers. Formulas: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353).

Shapes: A [r, in], B [out, r]; the change of a weight [out, in] is scale * B A.
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
from onecard.models import adapter as models_adapter
from onecard.models import tensor_files
from onecard.models.tensor_files import Files, StoredTensor
from onecard.runs import folder as runs_folder
from onecard.system import files as system_files

PREFIX = "base_model.model."
CACHED = 1 << 19  # how many fp32 numbers fit into the cache of one core
PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?P<rest>\..+)?")
PATTERNS = ("rank_pattern", "alpha_pattern")
PLAIN_VALUES = {  # settings of other kinds of adapters, and their values in an adapter that can be merged
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
    "init_lora_weights": runs_folder.PLAIN_STARTS,
}


@dataclasses.dataclass
class Change:
    """How one module changes: where its low-rank pair lies in the file, and its scale."""

    a: StoredTensor  # [r, in]
    b: StoredTensor  # [out, r]
    scale: float
    bias: StoredTensor | None  # of B, [out]
    magnitude: StoredTensor | None  # DoRA's, [out]
    is_embedding: bool  # its weight is [in, out]

    def tensors(self) -> list[StoredTensor]:
        """All tensors of the adapter that belong to this module."""
        return [tensor for tensor in (self.a, self.b, self.bias, self.magnitude) if tensor is not None]

    def shape(self, transposed: bool) -> tuple[int, int]:
        """The shape of the module's weight; transposed: the module is a Conv1D, whose weight is [in, out]."""
        out, inside = self.b.shape[0], self.a.shape[1]
        return (inside, out) if transposed or self.is_embedding else (out, inside)


@dataclasses.dataclass
class Pair:
    """The low-rank pair of a change in memory, in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None
    transposed: bool  # the weight is [in, out]


@dataclasses.dataclass
class Adapter:
    """An adapter as its files hold it: changes by module name, and tensors that replace those of the base."""

    changes: dict[str, Change]
    whole: dict[str, StoredTensor]
    config: dict[str, Any]


def read(folder: Path) -> Adapter:
    """Read the headers of an adapter in a folder.

    Raises UserError (exit 4) for another kind of adapter, for a damaged file, and with a list of the tensors
    that are missing, unknown or of a wrong shape.
    """
    fix = "Take another copy of the adapter."
    config = system_files.read_json(folder / model_files.ADAPTER_CONFIG, fix) or {}
    if not isinstance(config, dict):
        raise _damaged(folder, "it is no JSON object")
    other = [name for name, plain in PLAIN_VALUES.items() if config.get(name, plain[0]) not in plain]
    if other:
        settings = ", ".join(f"{name} = {config[name]}" for name in other)
        problem = f"{folder}: an adapter with the setting {settings} cannot be merged into a base model."
        raise UserError(problem, "Load the base model and the adapter side by side instead.", CHECKPOINT)
    _check_patterns(folder, config)
    try:
        tensors = tensor_files.of_file(folder / model_files.ADAPTER_WEIGHTS)
    except UserError as error:
        raise UserError(error.problem, "Take another copy of the adapter.", CHECKPOINT) from None
    # for a module that was trained as a whole, peft may also save the untrained tensors
    untrained = [name for name in tensors if ".original_module." in name]
    for name in untrained:
        if name.replace(".original_module", "") in tensors:
            del tensors[name]
    misnamed = [name for name in tensors if not name.startswith(PREFIX)]
    parts: dict[str, dict[str, StoredTensor]] = {}
    whole: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX)
        match = PART.fullmatch(short)
        if match:
            key = match["part"] + (".bias" if (match["rest"] or "").endswith(".bias") else "")
            parts.setdefault(match["module"], {})[key] = tensor
        else:
            whole[short.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    misfits = list(misnamed)
    changes = {}
    for module, tensors_of_module in parts.items():
        change = _change(module, tensors_of_module, config)
        if isinstance(change, str):
            misfits.append(f"{module} ({change})")
        else:
            changes[module] = change
    if misfits or not (changes or whole):
        raise wrong(folder, misfits or ["no tensor at all"])
    return Adapter(changes, whole, config)


def wrong(folder: Path, names: list[str]) -> UserError:
    """The error for tensors that do not fit (exit 4); names: each with its reason in brackets."""
    shown = "; ".join(sorted(names)[:20]) + (f"; and {len(names) - 20} more" if len(names) > 20 else "")
    problem = f"{folder}: {len(names)} tensors of the adapter do not fit: {shown}."
    return UserError(problem, "Give the --model_path it was made with.", CHECKPOINT)


def _check_patterns(folder: Path, config: dict[str, Any]) -> None:
    """Raise UserError (exit 4) unless the patterns map regular expressions to values."""
    for name in PATTERNS:
        try:
            for pattern in dict(config.get(name) or {}):
                re.compile(pattern)
        except (re.error, TypeError, ValueError) as error:
            raise _damaged(folder, f"{name} maps no regular expressions to numbers: {error}") from None


def _damaged(folder: Path, reason: str) -> UserError:
    problem = f"{folder / model_files.ADAPTER_CONFIG} is damaged ({reason})."
    return UserError(problem, "Take another copy of the adapter.", CHECKPOINT)


def _change(module: str, tensors: dict[str, StoredTensor], config: dict[str, Any]) -> Change | str:
    """The change of one module, or what is wrong with its tensors, in words."""
    is_embedding = "lora_embedding_A" in tensors or "lora_embedding_B" in tensors
    kind = "lora_embedding_" if is_embedding else "lora_"
    a, b = tensors.get(f"{kind}A"), tensors.get(f"{kind}B")
    if a is None or b is None:
        return f"lacks {kind}{'A' if a is None else 'B'}"
    rank, alpha = (
        models_adapter.pattern_value(config.get(patterns) or {}, module, config.get(usual))
        for patterns, usual in zip(PATTERNS, ("r", "lora_alpha"), strict=True)
    )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != rank or b.shape[1] != rank:
        return f"A is {list(a.shape)} and B is {list(b.shape)}, but its rank is {rank}"
    if not rank or not isinstance(alpha, int | float):
        return f"its rank is {rank} and its alpha is {alpha}"
    magnitude = tensors.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        return "lacks lora_magnitude_vector" if magnitude is None else "has a magnitude without use_dora"
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Change(a, b, scale, tensors.get(f"{kind}B.bias"), magnitude, is_embedding)


def load(files: Files, change: Change, transposed: bool, folder: Path) -> Pair:
    """Read the low-rank pair of a change into memory.

    transposed: the module's weight is [in, out]; folder: the adapter's, for messages. Raises UserError
    (exit 4) when a value is not finite.
    """

    def value(tensor: StoredTensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        read = files.read(tensor, 0, tensor.rows).float()
        if not torch.isfinite(read).all():
            raise wrong(folder, [f"{tensor.name} (not finite)"])
        return read

    transposed = transposed or change.is_embedding
    return Pair(value(change.a), value(change.b), change.scale, value(change.magnitude), transposed)


def make_block(
    files: Files,
    source: StoredTensor,
    target: StoredTensor,
    pair: Pair | None,
    norms: torch.Tensor | None,
    bias: Change | None,
    first: int,
    last: int,
) -> None:
    """Read rows first..last (exclusive) of a tensor, change them, and write them to the target.

    pair, norms: how the rows of a weight change, as `merged` takes them; bias: the change whose B has a bias,
    for a tensor that is the bias of a module.
    """
    rows = files.read(source, first, last)
    if pair is not None:
        rows = merged(pair, rows, first, norms, target.dtype)
    if bias is not None:
        rows = rows.float() + files.read(bias.bias, first, last).float() * bias.scale
    files.write(target, first, rows.to(target.dtype))


def merged(
    pair: Pair, rows: torch.Tensor, first: int, norms: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The merged weight's rows from row `first` on, in `dtype`.

    rows: those of the base; they are overwritten when they have this dtype already. norms: what norms_of
    returns for the whole weight.
    """
    result = rows if rows.dtype == dtype else torch.empty_like(rows, dtype=dtype)
    for start, piece in _pieces(pair, rows, first):
        if norms is not None:
            factor = pair.magnitude / norms
            piece *= factor if pair.transposed else factor[first + start : first + start + len(piece), None]
        result[start : start + len(piece)].copy_(piece)
    return result


def norms_of(pair: Pair, blocks: Iterable[tuple[int, torch.Tensor]]) -> torch.Tensor | None:
    """The norms [out] of the changed weight over its inputs, which DoRA divides by; None without DoRA.

    blocks: (index of the first row, rows) of the base's weight.
    """
    if pair.magnitude is None:
        return None
    total = torch.zeros(pair.b.shape[0])
    for first, rows in blocks:
        for start, piece in _pieces(pair, rows, first):
            squares = piece.square_()
            if pair.transposed:
                total += squares.sum(0)
            else:
                total[first + start : first + start + len(piece)] = squares.sum(1)
    return total.sqrt()


def _pieces(pair: Pair, rows: torch.Tensor, first: int) -> Iterator[tuple[int, torch.Tensor]]:
    """(index within rows, rows + scale * B A in fp32), in a buffer that the next piece overwrites.

    A piece fits into the cache of a core, which halves the time of the three passes over it.
    """
    step = max(1, CACHED // rows.shape[1])
    buffer = torch.empty(min(step, len(rows)), rows.shape[1])
    for start in range(0, len(rows), step):
        last = min(start + step, len(rows))
        piece = buffer[: last - start].copy_(rows[start:last])
        rows_of_base = slice(first + start, first + last)
        a, b = (pair.a[:, rows_of_base].T, pair.b.T) if pair.transposed else (pair.b[rows_of_base], pair.a)
        yield start, piece.addmm_(a, b, alpha=pair.scale)
