"""The LoRA adapter of a base model: its layers, initial weights and tensors, built with peft.

It knows no rows and no optimizer steps. models/lora_shape.py has the settings of an adapter, and
models/trainable.py writes its files.
"""

import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError

from onecard.errors import CHECKPOINT, UserError, first_line, is_out_of_memory
from onecard.models import quantized
from onecard.models.dropout import CheapDropout
from onecard.models.lora_shape import ALL_LINEAR, EMBEDDINGS, LORA, LoraShape
from onecard.system import build_lock
from onecard.system import safetensors as system_safetensors

# what peft raises for settings and tensors that do not fit a base model
UNFIT = (AttributeError, IndexError, KeyError, OSError, RuntimeError, TypeError, ValueError)
UNFIT += (SafetensorError, re.error)


def add_adapter(base: torch.nn.Module, shape: LoraShape, seed: int) -> PeftModel:
    """Wrap the base with a new adapter in fp32. Its initial weights depend on nothing but the seed.

    Trained embeddings start with the values of the base. A tied head stays tied to them. Raises UserError
    when peft cannot build the adapter or cannot train the tied embeddings of this base.
    """
    embedding = base.get_input_embeddings()
    tied = base.get_output_embeddings().weight is embedding.weight
    targets, packed = shape.targets(), quantized.linear_names(base)
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        # peft's own "all-linear" knows plain layers only
        target_modules=packed if packed and targets == ALL_LINEAR else targets,
        task_type="CAUSAL_LM",
        modules_to_save=trained_whole(base, shape) or None,
        ensure_weight_tying=tied and shape.what != LORA,
        **shape.extra,
    )
    with build_lock.alone(), torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 uses a deprecated name of transformers
        torch.manual_seed(seed)
        try:
            model = get_peft_model(base, config)
        except (ValueError, TypeError, KeyError, IndexError, re.error) as error:
            raise UserError(
                f"peft cannot make this adapter: {error}.", "Correct the file of --peft_config."
            ) from None
    if next(base.parameters()).device.type == "cpu":
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout["default"] = CheapDropout(shape.dropout)
    if shape.what != LORA:
        _keep_embeddings_exact(model, embedding.weight.dtype, tied)
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32, "trained weights are fp32"
    return model


def trained_whole(base: torch.nn.Module, shape: LoraShape) -> list[str]:
    """Names of the modules that are trained as a whole: the input embedding, and with LoRA also the head.

    A head that is tied to the embedding is not named, because it follows the embedding.
    """
    modules_by_kind = {LORA: [], EMBEDDINGS: [base.get_input_embeddings()]}
    modules = modules_by_kind.get(shape.what, [base.get_input_embeddings(), base.get_output_embeddings()])
    if len(modules) == 2 and modules[0].weight is modules[1].weight:
        modules.pop()
    return [name for name, module in base.named_modules() if any(module is one for one in modules)]


def _keep_embeddings_exact(model: PeftModel, dtype: torch.dtype, tied: bool) -> None:
    """Keep trained embeddings in fp32, and cast their output to the dtype of the base."""
    base = model.get_base_model()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if tied and head.weight is not embedding.weight:
        problem = f"peft cannot train the tied embeddings of {type(base).__name__}."
        raise UserError(f"--train_what: {problem}", "Use --train_what lora or full.")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    embedding.register_forward_hook(lambda module, args, output: output.to(dtype))


def without_casts(model: PeftModel) -> AbstractContextManager:
    """A context for training steps in which peft does not cast the input of each adapter layer to fp32.

    Autocast casts the input back to the dtype of the base anyway. Some layers of peft skip the cast under
    autocast, but they do not notice autocast on a CPU.
    """
    return disable_input_dtype_casting(model)


def is_adapter(model: torch.nn.Module) -> bool:
    """Whether the model is a base model with an adapter around it."""
    return isinstance(model, PeftModel)


def count_parameters(model: PeftModel) -> int:
    """The number of parameters of base and adapter; a quantised weight counts with its original shape."""
    return model.get_nb_trainable_parameters()[1]


def adapter_tensors(
    model: PeftModel, gathered: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors, under the names that peft writes into a file. Other tensors are not touched.

    gathered: the adapter's parameters by their names in the model, for a model that is sharded over
    processes. Tied embeddings appear under both of their names, because peft reads both.
    """
    return get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=False)


def set_tensors(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy these tensors into the adapter; tensors that are not named stay as they are.

    Raises UserError (exit 4) when two names of one tied tensor come with different values.
    """
    new = {name: tensor.float() for name, tensor in tensors.items()}
    current = adapter_tensors(model)
    shared = {current[name].data_ptr(): name for name in new}  # of two names for one tensor, the last
    filled = {}
    for name, tensor in current.items():
        replacement = new.get(shared.get(tensor.data_ptr()))
        if name in new and not torch.equal(new[name], replacement):
            other = shared[tensor.data_ptr()]
            problem = f"{name} and {other} differ, but they are one tensor in this model."
            fix = "The checkpoint belongs to a base model whose head is not tied. Use that base model."
            raise UserError(problem, fix, CHECKPOINT)
        filled[name] = tensor if replacement is None else replacement
    set_peft_model_state_dict(model, filled)


def learned_nothing(model: PeftModel, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the adapter changes nothing: every B is still zero and the embeddings equal the base's."""
    if any(tensor.any() for name, tensor in tensors.items() if ".lora_B" in name):
        return False
    wrapped = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return all(
        torch.equal(module.weight, module.original_module.weight.to(module.weight)) for module in wrapped
    )


def matches(target: str, names: Iterable[str]) -> bool:
    """Whether peft takes any module of these names for this target module."""
    config = LoraConfig(target_modules=[target])
    return any(check_target_module_exists(config, name) for name in names)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """What rank_pattern or alpha_pattern says about the module of this name, as peft reads it.

    Without a pattern that matches it is the default. Raises re.error for a pattern that is no regular
    expression.
    """
    return patterns.get(get_pattern_key(list(patterns), module), default)


def save_config(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json, as peft does."""
    model.peft_config["default"].save_pretrained(str(folder))


def portable(name: str) -> str:
    """A parameter's name without its adapter's name, to compare the names in a model with those in a file.

    It drops ".weight" too, because some parameters have that ending in the model but not in the file.
    """
    return name.replace(".modules_to_save", "").replace(".default", "").removesuffix(".weight")


def attach(model: torch.nn.Module, folder: Path, name: str) -> PeftModel:
    """The model with one more adapter, which is read from a folder in peft's format. `mix` activates it.

    model: a base model, or what an earlier call returned; name: how `mix` refers to the adapter. Raises
    UserError (exit 4) when the adapter does not fit the model.
    """
    key = _key(name)
    system_safetensors.check(folder.glob(SAFETENSORS_WEIGHTS_NAME))
    try:
        with build_lock.alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated names of transformers that peft uses
            renamed = getattr(model, "_checkpoint_conversion_mapping", None)
            tensors = load_peft_weights(str(folder), device="cpu", key_mapping=renamed)
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=key)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=key)
            # from_pretrained does not report tensors that belong nowhere, so the tensors are set once more
            result = set_peft_model_state_dict(model, tensors, adapter_name=key)
    except UNFIT as error:
        if is_out_of_memory(error):
            raise
        raise _unfit(folder, first_line(error)) from None
    missing = [one.replace(f".{key}", "") for one in result.missing_keys if key in one.split(".")]
    unknown = [one.replace(f".{key}", "") for one in result.unexpected_keys]
    # tensors of the base itself: they would stay changed while the adapter is switched off
    own = tensors.keys() & dict(model.named_parameters()).keys()
    if missing or unknown or own:
        extra = (unknown or sorted(own) or [""])[0]
        raise _unfit(folder, f"it lacks {missing[0]}" if missing else f"the model has no {extra}")
    return model.eval()


def expected_shapes(bare: torch.nn.Module, folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an adapter with the settings in this folder has on this base.

    bare: the base without its weights, on the meta device; this call changes it. Raises UserError (exit 4)
    when peft cannot build such an adapter on this base.
    """
    try:
        with build_lock.alone(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(bare, LoraConfig.from_pretrained(str(folder)))
            tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    except UNFIT as error:
        raise _unfit(folder, first_line(error)) from None
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _unfit(folder: Path, reason: str) -> UserError:
    problem = f"{folder}: the adapter does not fit this base model: {reason}."
    return UserError(problem, "Give the --model_path it was made with.", CHECKPOINT)


def mix(model: PeftModel, weights: dict[str, float]) -> None:
    """Make exactly these adapters active, each scaled by its weight; {} means the base model alone."""
    if not weights:
        model.base_model.disable_adapter_layers()
        return
    model.base_model.enable_adapter_layers()
    model.base_model.set_adapter([_key(name) for name in weights], inference_mode=True)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, weight in weights.items():
                layer.set_scale(_key(name), weight)


def has_whole_modules(model: PeftModel, name: str) -> bool:
    """Whether this adapter holds trained embeddings, which can neither be scaled nor added to others."""
    return bool(model.peft_config[_key(name)].modules_to_save)


def _key(name: str) -> str:
    """The adapter's name inside peft, where it becomes the name of a module: no `train`, `keys` or v1.1."""
    return "adapter-" + name.replace(".", ":")
