"""The base model in 16, 8 or 4 bits, loaded with transformers and bitsandbytes.

This file knows no rows, no optimizer steps and no run folders.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from onecard.errors import CHECKPOINT, UNSAFE, UserError
from onecard.hub import client, model_files, remote_code, revisions
from onecard.hub.remote_code import TrustedCode
from onecard.models import adapter as models_adapter
from onecard.models import frozen_linear, lora_shape, packed_attention, quantized, trainable
from onecard.models.load_errors import NOT_A_MODEL, cannot_load
from onecard.models.lora_shape import LoraShape
from onecard.models.tokenizer import TOKENIZER_EXTRAS, TOKENIZER_FILES
from onecard.system import build_lock, gpus
from onecard.system import safetensors as system_safetensors

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# settings that change the logits or the attention, and the values with which they change nothing
PLAIN = {
    "logits_scaling": 1,
    "logit_scale": 1,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
SAFE_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


# share of a hidden state's norm: rounding changes at most a hundredth of it, another document about a half
MIXED = 0.1


def fetch_weights(path: str) -> None:
    """Fetch the weights of a base that was located by its name in the hub (revisions.complete).

    Raises UserError when the hub does not give them, and OSError when this machine's disk does not take them.
    """
    try:
        revisions.complete(Path(path), model_files.TENSORS)
    except client.REFUSALS as error:
        if client.is_local(error):
            raise
        raise cannot_load(path, "its weights", error) from None


def identity_files(path: str) -> dict[str, list[Path]]:
    """The files here that determine what a base model does, under the keys `tokenizer` and `weights`.

    Nothing is fetched: see fetch_weights.
    """
    folder, names = Path(path), (*TOKENIZER_FILES, *TOKENIZER_EXTRAS)
    return {
        "tokenizer": [folder / name for name in names if (folder / name).is_file()],
        "weights": sorted({file for pattern in SAFE_WEIGHTS for file in folder.glob(pattern)}),
    }


def load_config(path: str, code: TrustedCode | None = None) -> PretrainedConfig:
    """The transformers config of a base model; raises UserError when there is none.

    code, here and below: the user's consent to run Python code of the model; without it, a model that needs
    its own code is refused (exit 8).
    """
    try:
        if code:
            return code.read(AutoConfig)
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except NOT_A_MODEL as error:
        raise cannot_load(path, "its config.json", error) from None


def skeleton(path: str, config: PretrainedConfig, code: TrustedCode | None = None) -> torch.nn.Module:
    """The model without its weights, on the meta device; raises UserError when the config describes no model.

    Its dtype is torch's default dtype, whatever the config says: for the config's dtype, transformers would
    change the default of the whole process for a moment, in which another thread may compute. The config is
    not changed.
    """
    try:
        with build_lock.alone(), torch.device("meta"):
            config, dtype = copy.deepcopy(config), torch.get_default_dtype()
            if code:
                return code.build(AutoModelForCausalLM, config, dtype=dtype)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=dtype)
    except NOT_A_MODEL as error:
        raise cannot_load(path, "a causal language model from its config.json", error) from None


def check_architecture(
    path: str, config: PretrainedConfig, shape: LoraShape, code: TrustedCode | None = None
) -> int:
    """The number of parameters that will be trained; no weights are read.

    Raises UserError when a target module is not in the model, or when the model scales or caps its logits or
    its attention in a way that models/loss.py and models/packed_attention.py do not compute.
    """
    strange = [name for name, plain in PLAIN.items() if getattr(config, name, plain) not in (plain, None)]
    if strange:
        problem = f"--model_path {path}: models with {', '.join(strange)} cannot be trained yet."
        raise UserError(problem, "Choose a Llama-like model: Llama, Mistral, Qwen, SmolLM.")
    bare = skeleton(path, config, code)
    if shape.what == trainable.FULL:
        return sum(p.numel() for p in bare.parameters())
    if shape.what != lora_shape.EMBEDDINGS:
        _check_targets(bare, shape)
    with torch.device("meta"):
        adapted = models_adapter.add_adapter(bare, shape, seed=0)
    return sum(p.numel() for p in trainable.trainable(adapted))


def _check_targets(bare: torch.nn.Module, shape: LoraShape) -> None:
    """Raise UserError that names the target modules that the model lacks, and the ones that it has."""
    head = bare.get_output_embeddings()
    linear = {
        name: module
        for name, module in bare.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    }
    targets = shape.targets()
    everything = targets == lora_shape.ALL_LINEAR
    missing = [t for t in targets if not everything and not models_adapter.matches(t, linear)]
    if missing or not targets:
        absent = f"{', '.join(missing)}, which this model does not have" if missing else "no module"
        available = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise UserError(
            f"--lora_target_modules names {absent}.",
            f"It has {available}; all-linear takes them all.",
        )


def check_window(path: str, config: PretrainedConfig, longest: int) -> None:
    """Raise UserError when the model's attention window is shorter than the longest row (tokens)."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and window < longest:
        problem = (
            f"--model_path {path}: its attention window of {window} tokens is shorter than a row ({longest})."
        )
        raise UserError(problem, f"Use --cutoff_len {window} or less.")


def load_base(
    path: str,
    bits: int,
    dtype: str,
    device: str,
    config: PretrainedConfig | None = None,
    cards: dict[int | str, str] | None = None,
    to_train: bool = False,
    code: TrustedCode | None = None,
) -> torch.nn.Module:
    """A frozen causal language model whose 8-bit and 4-bit layers keep no activations.

    bits: 16; 8 means weights in int8 row by row (LLM.int8, arXiv 2208.07339); 4 means NF4 with double
    quantisation (QLoRA, arXiv 2305.14314). Weights that are quantised already (GPTQ, AWQ) stay as they are.
    dtype: a key of DTYPES. config: used in place of the folder's own. device: cpu, mps, cuda:N, or "all" for
    all GPUs; cards: the most memory of each of them, as accelerate's max_memory. to_train: an adapter on top
    of the model will be trained.

    Raises UserError: exit 2 when there is no model, 4 when it is damaged or lacks weights, 6 when it does not
    fit on the GPUs, 8 when its weights or its own code could run code.
    """
    torch_dtype = DTYPES[dtype]
    model_config = config or load_config(path, code)
    quantisation = quantized.how_to_read(path, model_config, to_train)
    plain = not quantized.method(model_config)
    if plain and bits == 8:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    elif plain and bits == 4:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype,
        )
    arguments = {
        "output_loading_info": True,
        "dtype": torch_dtype,
        "device_map": "auto" if device == "all" else {"": gpus.torch_name(device)},
    }
    if quantisation is not None:  # None would replace the setting of the folder's config
        arguments["quantization_config"] = quantisation
    if config is not None:
        arguments["config"] = config
    if cards:
        arguments["max_memory"] = cards
    _refuse_pickles(path)
    fetch_weights(path)
    system_safetensors.check(_weight_files(path))
    try:
        base, loading_info = _with_attention(path, "sdpa", arguments, code)
    except NOT_A_MODEL as error:
        raise cannot_load(path, "its weights", error) from None
    missing = sorted(loading_info["missing_keys"])
    if missing:  # transformers would initialise them at random
        problem = f"{path}: {len(missing)} of its weights are missing, {missing[0]} first."
        raise UserError(problem, "Download or convert it again.", CHECKPOINT)
    base.requires_grad_(False)
    frozen_linear.use_frozen_products(base)
    return base


def _weight_files(path: str) -> list[Path]:
    """The safetensors files that transformers will read.

    Raises UserError for an index that names files outside of the folder.
    """
    weights = identity_files(path)["weights"]
    folder = weights[0].parent if weights else Path(path)
    if (folder / model_files.INDEX).is_file():
        return model_files.files_of(folder)
    return [file for file in weights if file.suffix == ".safetensors"]


def _refuse_pickles(path: str) -> None:
    """Raise UserError (exit 8) for a folder that holds its weights only as pickles."""
    folder = Path(path)
    names = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    if folder.is_dir() and names and not any(folder.glob("*.safetensors")):
        problem = f"{path}: its weights are pickled ({names[0]}), and a pickle can run code."
        raise UserError(problem, "Take the model in safetensors, or have it converted.", UNSAFE)


def stretched(path: str, config: PretrainedConfig, how: str, factor: float) -> PretrainedConfig:
    """The config, changed in place for contexts that are `factor` times longer.

    how: "yarn" (arXiv 2309.00071) or "dynamic" (NTK-aware scaling). From the first token on, the rotation is
    that of the longest context: an answer never changes to another rotation while the cache holds keys with
    the first one. Raises UserError for models without rotary embeddings, or with scaled ones.
    """
    inner = config.get_text_config()
    rope = getattr(inner, "rope_parameters", None)
    length = getattr(inner, "max_position_embeddings", None)
    if not rope or not length or "rope_theta" not in rope:
        problem = f"{path} has no rotary embeddings, which the rope scaling {how} changes."
        raise UserError(problem, "Use this model without rope scaling.")
    if rope.get("rope_type", "default") != "default":
        problem = f"{path}: its rotary embeddings are scaled already ({rope['rope_type']})."
        raise UserError(problem, "Use this model without further rope scaling.")
    if how == "yarn":
        inner.rope_parameters = {
            **rope,
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": length,
        }
    else:
        width = getattr(inner, "head_dim", None) or inner.hidden_size // inner.num_attention_heads
        inner.rope_parameters = {**rope, "rope_theta": rope["rope_theta"] * factor ** (width / (width - 2))}
    inner.max_position_embeddings = int(length * factor)
    return config


def _with_attention(
    path: str, name: str, settings: dict[str, Any], code: TrustedCode | None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The base with this attention (or "eager" where it has no other, like BLOOM), and the loading info.

    settings: further arguments of from_pretrained.
    """
    settings = {**settings, "use_safetensors": True, "attn_implementation": name}
    try:
        with build_lock.alone():
            if code:
                return code.read(AutoModelForCausalLM, **settings)
            return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, **settings)
    except ValueError as error:
        if name == "eager" or remote_code.NO_ATTENTION not in str(error):
            raise
    return _with_attention(path, "eager", settings, code)


def prepare_for_packed_training(model: Any, checkpointing: bool) -> bool:
    """Switch the model to packed attention, and to gradient checkpointing when `checkpointing` is set.

    model: with or without an adapter. Returns False for a model whose attention cannot be packed: it keeps
    its own attention, and its rows must be given to it one by one.
    """
    base = trainable.base_of(model)
    own = base.config._attn_implementation
    if own != "eager":
        base.set_attn_implementation(packed_attention.NAME)
    packs = own != "eager" and _documents_are_apart(model)
    if not packs:
        base.set_attn_implementation(own)
    if checkpointing:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return packs


@torch.no_grad()
def _documents_are_apart(model: Any) -> bool:
    """Whether the second of two packed documents gives the same hidden states as it does alone.

    This is measured, because a model may accept the documents' lengths and ignore them.
    """
    decoder = trainable.base_of(model).get_decoder()
    device, lengths = next(model.parameters()).device, (7, 6)
    ids = torch.arange(2, 2 + sum(lengths), device=device)[None] % model.get_input_embeddings().num_embeddings
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    model.eval()
    try:
        packed, alone = (
            decoder(
                input_ids=ids[:, first:],
                position_ids=positions[:, first:],
                document_lengths=documents,
                use_cache=False,
            ).last_hidden_state.float()
            for first, documents in ((0, lengths), (lengths[0], lengths[1:]))
        )
    except (TypeError, ValueError):  # the model does not pass the documents' lengths on to its attention
        return False
    difference = (packed[:, lengths[0] :] - alone).norm() / alone.norm()
    return difference.item() < MIXED
