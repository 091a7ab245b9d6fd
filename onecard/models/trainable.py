"""The part of a model that is trained, which is an adapter or all weights, and its files in a checkpoint.

The files of an adapter are those of peft, the files of a whole model those of transformers. This file knows
no rows, no optimizer steps and no run folders.
"""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from onecard.errors import CHECKPOINT, UserError
from onecard.hub.model_files import ADAPTER_WEIGHTS, MODEL_WEIGHTS
from onecard.models import adapter as models_adapter
from onecard.models import lora_shape
from onecard.system import commands
from onecard.system.safetensors import read_tensors

FULL = "full"  # what is trained: all weights


def prepare(base: torch.nn.Module, shape: lora_shape.LoraShape, seed: int) -> torch.nn.Module:
    """The model to train: the frozen base with a new adapter, or the base with all weights (fp32) trainable.

    seed: of the adapter's initial weights. Raises UserError as add_adapter does.
    """
    if shape.what != FULL:
        return models_adapter.add_adapter(base, shape, seed)
    assert all(p.dtype == torch.float32 for p in base.parameters()), "trained weights are fp32"
    base.requires_grad_(True)
    base.get_input_embeddings().register_forward_hook(_as_autocast)
    return base


def _as_autocast(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """Cast the output of the embedding to autocast's dtype, as autocast does for the output of a product."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def base_of(model: Any) -> Any:
    """The base model: the model itself, or the one inside the adapter."""
    return model.get_base_model() if models_adapter.is_adapter(model) else model


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def without_casts(model: Any) -> AbstractContextManager:
    """A context for training steps; without_casts in models/adapter.py says why an adapter needs it."""
    return (
        models_adapter.without_casts(model) if models_adapter.is_adapter(model) else contextlib.nullcontext()
    )


def describe(model: Any) -> str:
    """One line about the trained parameters: their number, share, size and modules.

    A quantised weight counts with its original shape.
    """
    count = sum(parameter.numel() for parameter in trainable(model))
    if not models_adapter.is_adapter(model):
        return f"all {count:,} parameters, {count * 4 / 2**30:.2f} GiB in fp32"
    total = models_adapter.count_parameters(model)
    names = {
        models_adapter.portable(name).split(".lora_")[0].rsplit(".", 1)[-1]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    share = f"{count:,} of {total:,} parameters ({100 * count / total:.2f} %)"
    return f"{share}, {count * 4 / 2**20:.1f} MiB, in {', '.join(sorted(names))}"


def note_base(model: Any, name: str, commit: str) -> None:
    """Put the hub name of the base and its commit into the adapter's settings.

    peft itself would put the local folder of the base there.
    """
    if models_adapter.is_adapter(model):
        settings = model.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = name, commit


def own_tensors(model: Any, gathered: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The trained tensors themselves (no copies), under the names that peft or transformers reads.

    gathered: the trained parameters by their names in the model, for a model that is sharded over processes.
    """
    if models_adapter.is_adapter(model):
        return models_adapter.adapter_tensors(model, gathered)
    persistent = model.state_dict().keys()  # not every buffer of a model belongs into its files
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**(gathered or dict(model.named_parameters())), **buffers}


def file_tensors(model: Any, gathered: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The trained tensors as a file takes them: on the CPU, and each name with memory of its own.

    gathered: as in own_tensors.
    """
    named, seen = {}, set()
    for name, tensor in own_tensors(model, gathered).items():
        here = tensor.detach().cpu().contiguous()
        named[name] = here.clone() if here.data_ptr() in seen else here
        seen.add(here.data_ptr())
    return named


def load(model: Any, checkpoint: Path) -> None:
    """Copy the tensors of a checkpoint folder into the model; raises UserError (exit 4) unless all fit."""
    path = checkpoint / (ADAPTER_WEIGHTS if models_adapter.is_adapter(model) else MODEL_WEIGHTS)
    assign(model, read_tensors(path), str(path))


def assign(model: Any, new: dict[str, torch.Tensor], source: str, start: bool = False) -> None:
    """Copy these tensors into the model.

    source: where they come from, for messages. start: a new run starts with them and may train more; so the
    embeddings, or all LoRA tensors, may be missing and then stay as they are. Raises UserError (exit 4) when
    other tensors are missing, unknown or of another shape.
    """
    current = own_tensors(model)
    missing, unknown = current.keys() - new.keys(), new.keys() - current.keys()
    if start:
        has_lora = any(".lora_" in name for name in new)
        missing = {name for name in missing if ".lora_" in name and has_lora} if new else set(current)
    other = [name for name in current.keys() & new.keys() if current[name].shape != new[name].shape]
    if missing or unknown or other:
        name = sorted(missing or unknown or other)[0]
        counts = f"missing: {len(missing)}, unknown: {len(unknown)}, of another shape: {len(other)}"
        problem = f"The tensors of {source} are not those that are trained here ({counts}; first: {name})."
        fix = "Use the base model, rank and target modules with which they were trained."
        raise UserError(problem, fix, CHECKPOINT)
    if models_adapter.is_adapter(model):
        models_adapter.set_tensors(model, new)
        return
    with torch.no_grad():
        for name, tensor in new.items():
            current[name].copy_(tensor)


def save(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    was_updated: bool,
    gathered: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write the trained tensors and their configuration into a folder, then read the tensors and compare.

    tokenizer: written beside a whole model, so that the folder is a complete model; an adapter needs none.
    was_updated: a step with a learning rate above zero was made, so the adapter must have changed.
    gathered: as in own_tensors. Raises UserError (exit 4) when trained tensors are missing, a value is not
    finite, the adapter learned nothing, or the file does not hold what was written.
    """
    written = file_tensors(model, gathered)
    is_adapter = models_adapter.is_adapter(model)
    trained = {models_adapter.portable(name) for name, p in model.named_parameters() if p.requires_grad}
    if not trained or not trained <= {models_adapter.portable(name) for name in written}:
        counts = f"there are {len(written)} tensors, but {len(trained)} were trained"
        problem = f"The trained weights were not saved, because they are incomplete: {counts}."
        raise UserError(problem, "Please report this error.", CHECKPOINT)
    bad = [name for name, tensor in written.items() if not torch.isfinite(tensor).all()]
    if bad:
        problem = f"The trained weights were not saved, because some are not finite ({bad[0]})."
        raise UserError(problem, "Lower --learning_rate.", CHECKPOINT)
    if was_updated and is_adapter and models_adapter.learned_nothing(model, written):
        problem = "The adapter learned nothing: it changes no output of the base model. It was not saved."
        fix = f"Start anew with {commands.name('finetune')} --overwrite and a larger --learning_rate."
        raise UserError(problem, fix, CHECKPOINT)
    if is_adapter:
        models_adapter.save_config(model, folder)
    else:
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    path = folder / (ADAPTER_WEIGHTS if is_adapter else MODEL_WEIGHTS)
    save_file(written, path, metadata={"format": "pt"})
    with safe_open(path, "pt") as read:
        same = set(read.keys()) == written.keys() and all(
            torch.equal(read.get_tensor(name), tensor) for name, tensor in written.items()
        )
    if not same:
        problem = f"{path} does not hold the tensors that were written."
        raise UserError(problem, "Check the disk.", CHECKPOINT)
