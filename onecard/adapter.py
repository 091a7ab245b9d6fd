"""The adapter: its shape, its start, its tensors. The only file that touches peft.

It does not know rows, steps or run folders.
"""

import dataclasses
import json
import re
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from onecard.checkpoint import read_tensors
from onecard.dropout import CheapDropout
from onecard.errors import CHECKPOINT, UserError
from onecard.runfolder import ADAPTER_WEIGHTS

# of LoraConfig: what --peft_config may say; a checkpoint stays an adapter that any tool can load
EXTRAS = {
    "alpha_pattern": dict,
    "exclude_modules": list,
    "init_lora_weights": (bool, str),
    "layers_pattern": str,
    "layers_to_transform": list,
    "rank_pattern": dict,
    "use_dora": bool,
    "use_rslora": bool,
}
PLAIN_STARTS = (True, "gaussian", "orthogonal")  # others change the base's weights, or need rows


@dataclasses.dataclass(frozen=True)
class LoraShape:
    """What an adapter looks like: rank, alpha, dropout, module names (or all-linear), further settings."""

    r: int
    alpha: float
    dropout: float
    target_modules: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # of peft's LoraConfig

    def targets(self) -> str | list[str]:
        names = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        return "all-linear" if names == ["all-linear"] else names


def read_extras(path: str | None, rslora: bool) -> dict[str, Any]:
    """Further settings of the adapter, of --peft_config and --rslora; raises UserError naming a wrong one."""
    extras: dict[str, Any] = {}
    if path:

        def wrong(problem: str) -> UserError:
            return UserError(f"--peft_config {path}: {problem}.", f"It may hold: {', '.join(EXTRAS)}.")

        try:
            extras = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise wrong(f"cannot be read ({error})") from None
        if not isinstance(extras, dict):
            raise wrong("holds no JSON object")
        for name, value in extras.items():
            if name not in EXTRAS:
                raise wrong(f"{name!r} is another kind of adapter, or has an option of its own")
            if not isinstance(value, EXTRAS[name]):
                raise wrong(f"{name!r} cannot be {value!r}")
        if extras.get("init_lora_weights", True) not in PLAIN_STARTS:
            raise wrong(f"init_lora_weights can be {', '.join(map(str, PLAIN_STARTS))}")
    if rslora:
        extras["use_rslora"] = True
    return extras


def add_adapter(base: torch.nn.Module, shape: LoraShape, seed: int) -> PeftModel:
    """Wrap the base with a new LoRA adapter in fp32; its start is a pure function of the seed."""
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.targets(),
        task_type="CAUSAL_LM",
        **shape.extra,
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by a name that will go
        torch.manual_seed(seed)
        try:
            model = get_peft_model(base, config)
        except (ValueError, TypeError, KeyError, IndexError, re.error) as error:
            raise UserError(f"peft cannot make this adapter: {error}.", "Look at --peft_config.") from None
    if next(base.parameters()).device.type == "cpu":
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout["default"] = CheapDropout(shape.dropout)
    for parameter in trainable(model):
        assert parameter.dtype == torch.float32, "adapter weights are kept in fp32"
    return model


def without_casts(model: PeftModel) -> AbstractContextManager:
    """For training steps: peft would cast every adapter's input to fp32 (some of its layers leave that out
    under autocast, but do not see autocast on a CPU); autocast takes it to the base's dtype anyway."""
    return disable_input_dtype_casting(model)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def describe_adapter(model: PeftModel) -> str:
    """Trainable-parameter report; quantised weights are counted by their shapes, not by their bytes."""
    count, total = model.get_nb_trainable_parameters()
    names = sorted(
        {
            name.split(".lora_")[0].rsplit(".", 1)[-1]
            for name, p in model.named_parameters()
            if p.requires_grad
        }
    )
    share = f"{count:,} of {total:,} parameters ({100 * count / total:.2f} %)"
    return f"{share}, {count * 4 / 2**20:.1f} MiB, in {', '.join(names)}"


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU under their portable names; nothing else is gathered or asked for."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


def load_adapter(model: PeftModel, weights: Path) -> None:
    """Give the adapter the tensors of a safetensors file; raises UserError (exit 4) unless all fit."""
    set_adapter(model, read_tensors(weights), str(weights))


def set_adapter(model: PeftModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Give the adapter these tensors; raises UserError (exit 4) for missing, unknown or misshapen ones."""
    own = adapter_tensors(model)
    missing, unknown = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    other = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or unknown or other:
        name = sorted(missing or unknown or other)[0]
        counts = f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(other)} of another shape"
        problem = f"{source}: does not fit this adapter: {counts} (first: {name})."
        raise UserError(problem, "Rank, targets and base model must be those it was made with.", CHECKPOINT)
    set_peft_model_state_dict(model, {name: tensor.float() for name, tensor in tensors.items()})


def save_adapter(model: PeftModel, folder: Path, was_updated: bool) -> None:
    """Write adapter_config.json and adapter_model.safetensors, then read them back and compare.

    was_updated: at a rate above zero, so that some B must have left zero, where it starts. Raises UserError
    (exit 4) when the adapter is empty, not finite, does nothing though updated, or reads back differently.
    """
    tensors = adapter_tensors(model)
    wanted = {_portable(name) for name, p in model.named_parameters() if p.requires_grad}
    if not tensors or {_portable(name) for name in tensors} != wanted:
        raise UserError(
            f"The adapter has {len(tensors)} tensors, {len(wanted)} were trained; not saved.", "", CHECKPOINT
        )
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise UserError(
            f"The adapter is not finite ({bad[0]}); not saved.", "Lower --learning_rate.", CHECKPOINT
        )
    if was_updated and not any(tensor.any() for name, tensor in tensors.items() if ".lora_B" in name):
        problem = "The adapter learned nothing: all of its B matrices are zero; not saved."
        raise UserError(problem, "Raise --learning_rate, and start anew with --overwrite.", CHECKPOINT)
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(str(folder))
    read = load_file(folder / ADAPTER_WEIGHTS)
    if read.keys() != tensors.keys() or any(not torch.equal(read[name], tensors[name]) for name in tensors):
        raise UserError(
            f"{folder / ADAPTER_WEIGHTS}: not the same after reading back.", "Check the disk.", CHECKPOINT
        )


def _portable(name: str) -> str:
    """A tensor's name without the adapter's own; some kinds end in .weight only while they are trained."""
    return name.replace(".default", "").removesuffix(".weight")
