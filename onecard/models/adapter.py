"""The adapter: its shape, its start, its tensors. The only file that touches peft.

It does not know files, rows or steps; its files are written by models/trainable.py.
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
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from peft.utils.constants import DUMMY_TARGET_MODULES as NO_TARGETS
from safetensors import SafetensorError

from onecard.config.training import FinetuneConfig
from onecard.errors import CHECKPOINT, UserError, is_out_of_memory
from onecard.models import quantized
from onecard.models.dropout import CheapDropout
from onecard.system import build_lock
from onecard.system import safetensors as safetensors_file

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
ALL_LINEAR = "all-linear"  # as target modules: every linear layer but the head
LORA, EMBEDDINGS, BOTH = "lora", "embeddings", "lora+embeddings"  # kinds of adapters
STARTS = (True, "gaussian", "orthogonal")  # for training; others change the base's weights, or need rows


@dataclasses.dataclass(frozen=True)
class LoraShape:
    """What an adapter looks like: rank, alpha, dropout, module names (or all-linear), further settings.

    what: lora; embeddings (the input embedding alone, whole); lora+embeddings (and the head).
    """

    r: int
    alpha: float
    dropout: float
    target_modules: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # of peft's LoraConfig
    what: str = LORA

    @classmethod
    def of(cls, options: FinetuneConfig) -> "LoraShape":
        """The shape that the options ask for; reads the file of --peft_config and may raise UserError."""
        return cls(
            options.lora_r,
            options.lora_alpha,
            options.lora_dropout,
            options.lora_target_modules,
            read_extras(options.peft_config, options.rslora),
            options.train_what,
        )

    def targets(self) -> str | list[str]:
        if self.what == EMBEDDINGS:
            return NO_TARGETS  # no module gets a low-rank pair
        names = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        return ALL_LINEAR if names == [ALL_LINEAR] else names


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
        if extras.get("init_lora_weights", True) not in STARTS:
            raise wrong(f"init_lora_weights can be {', '.join(map(str, STARTS))}")
    if rslora:
        extras["use_rslora"] = True
    return extras


def add_adapter(base: torch.nn.Module, shape: LoraShape, seed: int) -> PeftModel:
    """Wrap the base with a new adapter in fp32; its start is a pure function of the seed.

    Embeddings that are trained start as the base's; a tied head stays tied to them.
    """
    embedding = base.get_input_embeddings()
    tied = base.get_output_embeddings().weight is embedding.weight
    targets, packed = shape.targets(), quantized.linear_names(base)
    config = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=packed if packed and targets == ALL_LINEAR else targets,  # peft finds plain ones only
        task_type="CAUSAL_LM",
        modules_to_save=trained_whole(base, shape) or None,
        ensure_weight_tying=tied and shape.what != LORA,
        **shape.extra,
    )
    with build_lock.alone(), torch.random.fork_rng(), warnings.catch_warnings():
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
    if shape.what != LORA:
        _keep_embeddings_exact(model, embedding.weight.dtype, tied)
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.dtype == torch.float32, "trained weights are fp32"
    return model


def trained_whole(base: torch.nn.Module, shape: LoraShape) -> list[str]:
    """Names of the modules that are trained as they are: the input embedding, with LoRA also the head."""
    wanted = {LORA: [], EMBEDDINGS: [base.get_input_embeddings()]}
    modules = wanted.get(shape.what, [base.get_input_embeddings(), base.get_output_embeddings()])
    if len(modules) == 2 and modules[0].weight is modules[1].weight:
        modules.pop()  # the head follows the embedding
    return [name for name, module in base.named_modules() if any(module is one for one in modules)]


def _keep_embeddings_exact(model: PeftModel, dtype: torch.dtype, tied: bool) -> None:
    """Embeddings are trained in fp32; what leaves them goes on in the base's dtype."""
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
    """For training steps: peft would cast every adapter's input to fp32 (some of its layers leave that out
    under autocast, but do not see autocast on a CPU); autocast takes it to the base's dtype anyway."""
    return disable_input_dtype_casting(model)


def is_adapter(model: torch.nn.Module) -> bool:
    return isinstance(model, PeftModel)


def count_parameters(model: PeftModel) -> int:
    """All parameters of base and adapter; quantised ones by their shapes."""
    return model.get_nb_trainable_parameters()[1]


def adapter_tensors(
    model: PeftModel, gathered: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The adapter's tensors under their portable names; nothing else is gathered or asked for.

    gathered: its parameters by their names in the model, when they are spread over processes. Tied embeddings
    have both names, since peft asks for both.
    """
    return get_peft_model_state_dict(model, state_dict=gathered, save_embedding_layers=False)


def set_tensors(model: PeftModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give the adapter these tensors; others stay as they are."""
    given = {name: tensor.float() for name, tensor in tensors.items()}
    places = adapter_tensors(model)
    tied = {places[name].data_ptr(): name for name in given}  # of two names for one tensor the last
    filled = {}
    for name, place in places.items():
        same = given.get(tied.get(place.data_ptr()))
        if name in given and not torch.equal(given[name], same):
            problem = f"{name} and {tied[place.data_ptr()]} differ, and are one tensor in this model."
            raise UserError(problem, "It was made for a base whose head is not tied.", CHECKPOINT)
        filled[name] = place if same is None else same
    set_peft_model_state_dict(model, filled)


def learned_nothing(model: PeftModel, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether every B is zero, where it starts, and the embeddings are still the base's."""
    if any(tensor.any() for name, tensor in tensors.items() if ".lora_B" in name):
        return False
    wrapped = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    return all(
        torch.equal(module.weight, module.original_module.weight.to(module.weight)) for module in wrapped
    )


def save_config(model: PeftModel, folder: Path) -> None:
    model.peft_config["default"].save_pretrained(str(folder))


def portable(name: str) -> str:
    """A parameter's name without the adapter's own; some kinds end in .weight only while they are trained."""
    return name.replace(".modules_to_save", "").replace(".default", "").removesuffix(".weight")


def attach(model: torch.nn.Module, folder: Path, name: str) -> PeftModel:
    """The model with one more adapter, read from a folder as peft writes it, by this name; none is active.

    Raises UserError (exit 4) when it does not fit the model.
    """
    key = _key(name)
    safetensors_file.check(folder.glob(SAFETENSORS_WEIGHTS_NAME))
    try:
        with build_lock.alone(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names peft asks transformers by
            renamed = getattr(model, "_checkpoint_conversion_mapping", None)
            tensors = load_peft_weights(str(folder), device="cpu", key_mapping=renamed)
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=key)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=key)
            # once more: from_pretrained does not say which tensors found no place
            result = set_peft_model_state_dict(model, tensors, adapter_name=key)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, AttributeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise _unfit(folder, reason) from None
    missing = [one.replace(f".{key}", "") for one in result.missing_keys if key in one.split(".")]
    unknown = [one.replace(f".{key}", "") for one in result.unexpected_keys]
    own = tensors.keys() & dict(model.named_parameters()).keys()  # it would stay changed with the adapter off
    if missing or unknown or own:
        extra = (unknown or sorted(own) or [""])[0]
        raise _unfit(folder, f"it lacks {missing[0]}" if missing else f"there is no place for {extra}")
    return model.eval()


def wanted(bare: torch.nn.Module, folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that an adapter with this folder's settings has on this base.

    bare: the base without its weights, on the meta device; it is changed. Raises UserError (exit 4).
    """
    try:
        with build_lock.alone(), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(bare, LoraConfig.from_pretrained(str(folder)))
            tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, re.error, OSError) as error:
        raise _unfit(folder, str(error).strip().splitlines()[0][:200]) from None
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _unfit(folder: Path, reason: str) -> UserError:
    problem = f"{folder}: the adapter does not fit this base model: {reason}."
    return UserError(problem, "Give the --model_path it was made with.", CHECKPOINT)


def mix(model: PeftModel, weights: dict[str, float]) -> None:
    """Make these adapters active, each times its weight; none: the base alone."""
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
    """Whether this adapter holds trained embeddings, which can neither be weighted nor added to others'."""
    return bool(model.peft_config[_key(name)].modules_to_save)


def _key(name: str) -> str:
    """A name as peft can have it: it becomes a module's, and `train`, `keys` or v1.1 cannot be one."""
    return "adapter-" + name.replace(".", ":")
