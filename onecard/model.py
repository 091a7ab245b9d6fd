"""Base model in 16, 8 or 4 bits plus adapter, through transformers, peft and bitsandbytes.

The only file that touches peft. It does not know rows, steps or run folders.
"""

import dataclasses
import json
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)

from onecard import attention, frozen
from onecard.checkpoint import read_tensors
from onecard.dropout import CheapDropout
from onecard.errors import CHECKPOINT, UserError
from onecard.runfolder import ADAPTER_WEIGHTS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what transformers raises for folders that hold no model, or a damaged one
NOT_A_MODEL = (OSError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError)
# settings that change logits or attention, and their values that do not
PLAIN = {
    "logits_scaling": 1,
    "logit_scale": 1,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_EXTRAS = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
SAFE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
NOT_LOADED = ["*/*", "consolidated*"]  # what transformers leaves alone
PICKLED_WEIGHTS = ("*.bin", "*.bin.index.json", "config.json")


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


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a base model; raises UserError when there is none or it has no end token."""
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"--model_path {path}: the folder has no tokenizer.",
            f"It needs one of: {', '.join(TOKENIZER_FILES)}.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except NOT_A_MODEL as error:
        raise _cannot_load(path, "its tokenizer", error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model_path {path}: the tokenizer has no end token.", "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def identity_files(path: str) -> dict[str, list[Path]]:
    """The files that make a base what it is, as `tokenizer` and `weights`; of a hub name: of its snapshot."""
    folder, names = Path(path), (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    if not folder.is_dir():
        try:
            folder = Path(
                snapshot_download(path, allow_patterns=[*names, *SAFE_WEIGHTS], ignore_patterns=NOT_LOADED)
            )
            if not list(folder.glob(SAFE_WEIGHTS[0])):  # repositories often hold both kinds
                folder = Path(
                    snapshot_download(
                        path, allow_patterns=[*names, *PICKLED_WEIGHTS], ignore_patterns=NOT_LOADED
                    )
                )
        except (OSError, ValueError, HfHubHTTPError) as error:
            raise _cannot_load(path, "its files", error) from None
    patterns = SAFE_WEIGHTS if list(folder.glob(SAFE_WEIGHTS[0])) else PICKLED_WEIGHTS
    return {
        "tokenizer": [folder / name for name in names if (folder / name).is_file()],
        "weights": sorted({file for pattern in patterns for file in folder.glob(pattern)}),
    }


def load_config(path: str) -> Any:
    """transformers config of a base model; raises UserError when there is none."""
    try:
        return AutoConfig.from_pretrained(path)
    except NOT_A_MODEL as error:
        raise _cannot_load(path, "its config.json", error) from None


def check_architecture(path: str, config: Any, shape: LoraShape) -> int:
    """Number of parameters the adapter will have; no weight is read.

    Raises UserError when a target module is not in the model, or when the model is of a kind whose logits or
    attention are not the plain ones that loss.py and attention.py compute.
    """
    strange = [name for name, plain in PLAIN.items() if getattr(config, name, plain) not in (plain, None)]
    if strange:
        problem = f"--model_path {path}: models with {', '.join(strange)} cannot be trained yet."
        raise UserError(problem, "Choose a Llama-like model: Llama, Mistral, Qwen, SmolLM.")
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except NOT_A_MODEL as error:
        raise _cannot_load(path, "a causal language model from its config.json", error) from None
    head = skeleton.get_output_embeddings()
    linear = {
        name: module
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    targets = shape.targets()
    everything = targets == "all-linear"
    missing = [t for t in targets if not everything and not any(_is_named(name, t) for name in linear)]
    if missing or not targets:
        wrong = ", ".join(missing) or "no name given"
        found = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise UserError(
            f"--lora_target_modules: {wrong}: not in this model.", f"Found: {found}; or all-linear."
        )
    chosen = [
        layer for name, layer in linear.items() if everything or any(_is_named(name, t) for t in targets)
    ]
    return sum(shape.r * (layer.in_features + layer.out_features) for layer in chosen)


def check_window(path: str, config: Any, longest: int) -> None:
    """Raise UserError when the model's attention window is shorter than the longest row (tokens)."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < longest:
        problem = (
            f"--model_path {path}: its attention window of {window} tokens is shorter than a row ({longest})."
        )
        raise UserError(problem, f"Use --cutoff_len {window} or less.")


def load_base(path: str, bits: int, dtype: str, device: str) -> torch.nn.Module:
    """Frozen causal language model with per-document attention and frozen products.

    bits 8: LLM.int8 row-wise weights; bits 4: NF4 with double quantisation (QLoRA, arXiv 2305.14314).
    """
    torch_dtype = DTYPES[dtype]
    quantisation = None
    if bits == 8:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    elif bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
        )
    try:
        base = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch_dtype,
            quantization_config=quantisation,
            device_map={"": device},
            attn_implementation="sdpa",
        )
    except NOT_A_MODEL as error:
        raise _cannot_load(path, "its weights", error) from None
    base.requires_grad_(False)
    frozen.use_frozen_products(base)
    return base


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
        model = get_peft_model(base, config)
    if next(base.parameters()).device.type == "cpu":
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.lora_dropout["default"] = CheapDropout(shape.dropout)
    for parameter in trainable(model):
        assert parameter.dtype == torch.float32, "adapter weights are kept in fp32"
    return model


def prepare_for_packed_training(model: PeftModel, checkpointing: bool) -> None:
    """Packed attention, and recomputation of each layer's activations when `checkpointing`."""
    base = model.get_base_model()
    base.set_attn_implementation(attention.NAME)
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()


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
    wanted = {
        name.replace(".default.", ".").replace(".default", "")
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    if not tensors or {name.rsplit(".", 1)[0] for name in tensors} != {
        name.rsplit(".", 1)[0] for name in wanted
    }:
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


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _cannot_load(path: str, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(
        f"--model_path {path}: cannot load {what}: {reason[:200]}",
        "Give a model folder, a hub name, or demo.",
    )
