"""What is trained of a model, an adapter or all of it: its parameters, and its files in a checkpoint.

An adapter's files are peft's, a whole model's those of transformers. This file does not know rows, steps or
run folders.
"""

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from onecard.errors import CHECKPOINT, UserError
from onecard.hub.model_files import ADAPTER_WEIGHTS, MODEL_WEIGHTS
from onecard.models import adapter as models_adapter
from onecard.system.safetensors import read_tensors

FULL = "full"


def prepare(base: Any, shape: models_adapter.LoraShape, seed: int) -> Any:
    """Put an adapter around the frozen base, or make all of its weights (fp32) trainable."""
    if shape.what != FULL:
        return models_adapter.add_adapter(base, shape, seed)
    assert all(p.dtype == torch.float32 for p in base.parameters()), "trained weights are kept in fp32"
    base.requires_grad_(True)
    base.get_input_embeddings().register_forward_hook(_as_autocast)
    return base


def _as_autocast(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    """What leaves the embedding goes on in autocast's dtype, as what leaves a product does."""
    device = output.device.type
    return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output


def base_of(model: Any) -> Any:
    return model.get_base_model() if models_adapter.is_adapter(model) else model


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def without_casts(model: Any) -> AbstractContextManager:
    """For training steps; models/adapter.py gives the reason."""
    return (
        models_adapter.without_casts(model) if models_adapter.is_adapter(model) else contextlib.nullcontext()
    )


def describe(model: Any) -> str:
    """Trainable-parameter report; quantised weights are counted by their shapes, not by their bytes."""
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
    """Write a hub's model into the adapter's settings as peft does, which would name its folder here."""
    if models_adapter.is_adapter(model):
        settings = model.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = name, commit


def places(model: Any, gathered: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """What is trained, where it lies, under the names that peft or transformers reads.

    gathered: the trained parameters by their names in the model, when they are spread over processes.
    """
    if models_adapter.is_adapter(model):
        return models_adapter.adapter_tensors(model, gathered)
    persistent = model.state_dict().keys()  # a model's buffers may or may not be kept
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**(gathered or dict(model.named_parameters())), **buffers}


def tensors(model: Any, gathered: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The same as a file takes them: on the CPU, and of two names for one tensor the second with a copy."""
    named, seen = {}, set()
    for name, tensor in places(model, gathered).items():
        here = tensor.detach().cpu().contiguous()
        named[name] = here.clone() if here.data_ptr() in seen else here
        seen.add(here.data_ptr())
    return named


def load(model: Any, checkpoint: Path) -> None:
    """Give the model the tensors of a checkpoint; raises UserError (exit 4) unless all fit."""
    path = checkpoint / (ADAPTER_WEIGHTS if models_adapter.is_adapter(model) else MODEL_WEIGHTS)
    assign(model, read_tensors(path), str(path))


def assign(model: Any, given: dict[str, torch.Tensor], source: str, start: bool = False) -> None:
    """Give the model these tensors; raises UserError (exit 4) for missing, unknown or misshapen ones.

    start: embeddings, or all of LoRA, may be missing and then stay as they are: a new run trains more.
    """
    own = places(model)
    missing, unknown = own.keys() - given.keys(), given.keys() - own.keys()
    if start:
        has_lora = any(".lora_" in name for name in given)
        missing = {name for name in missing if ".lora_" in name and has_lora} or (own if not given else set())
    other = [name for name in own.keys() & given.keys() if own[name].shape != given[name].shape]
    if missing or unknown or other:
        name = sorted(missing or unknown or other)[0]
        counts = f"{len(missing)} tensors missing, {len(unknown)} unknown, {len(other)} of another shape"
        problem = f"{source}: does not fit what is trained here: {counts} (first: {name})."
        raise UserError(problem, "Rank, targets and base model must be those it was made with.", CHECKPOINT)
    if models_adapter.is_adapter(model):
        models_adapter.set_tensors(model, given)
        return
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    was_updated: bool,
    gathered: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write what was trained and its configuration, then read the tensors back and compare.

    A whole model comes with its tokenizer, so that the folder is a model. was_updated: at a rate above zero,
    so that something must have changed; gathered: as in tensors(). Raises UserError (exit 4) when nothing is
    there, something is not finite, nothing was learned, or the file reads back differently.
    """
    written = tensors(model, gathered)
    is_adapter = models_adapter.is_adapter(model)
    wanted = {models_adapter.portable(name) for name, p in model.named_parameters() if p.requires_grad}
    if not wanted or not wanted <= {models_adapter.portable(name) for name in written}:
        problem = f"{len(written)} tensors are there, {len(wanted)} were trained; not saved."
        raise UserError(f"The trained weights are incomplete: {problem}", "", CHECKPOINT)
    bad = [name for name, tensor in written.items() if not torch.isfinite(tensor).all()]
    if bad:
        problem = f"The trained weights are not finite ({bad[0]}); not saved."
        raise UserError(problem, "Lower --learning_rate.", CHECKPOINT)
    if was_updated and is_adapter and models_adapter.learned_nothing(model, written):
        problem = "The adapter learned nothing: it does what it did before the first step; not saved."
        raise UserError(problem, "Raise --learning_rate, and start anew with --overwrite.", CHECKPOINT)
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
        raise UserError(f"{path}: not the same after reading back.", "Check the disk.", CHECKPOINT)
