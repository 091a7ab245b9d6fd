"""A model folder and its adapters -> GGUF files for llama.cpp.

The converter and the quantiser of llama.cpp run in child processes (llama_cpp_converter.py,
llama_cpp_quantizer.py); gguf_cache.py keeps their files. Nothing here knows engines or conversations.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onecard.conversion import llama_cpp_converter, llama_cpp_quantizer
from onecard.errors import CHECKPOINT, USAGE, UserError
from onecard.hub import model_files
from onecard.runs import folder as runs_folder
from onecard.system import files as system_files
from onecard.system import output_folder
from onecard.system import safetensors as system_safetensors

MODEL_FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickles, no code
FOLDER = "gguf"  # tools/export_gguf.py puts its files into FOLDER-TYPE
NO_PLACE = {  # keys of adapter_config.json for what a GGUF adapter cannot hold -> words for it
    "use_dora": "DoRA",
    "modules_to_save": "trained embeddings",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "biases",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters of experts",
    "alora_invocation_tokens": "tokens that switch it on",
}
ADAPTER_FILES = (model_files.ADAPTER_CONFIG, model_files.ADAPTER_WEIGHTS)


def base(
    folder: Path, output: Path, any_tokenizer: bool = False, kind: str = "f16", eos_ids: Sequence[int] = ()
) -> Path:
    """Convert a transformers model folder to a GGUF file.

    kind: f32, f16, bf16, q8_0; auto: the 16-bit type that the weights have. any_tokenizer: also accept a
    tokenizer whose way of splitting text llama.cpp does not know. OneCard encodes with the tokenizer of
    transformers, but other programs would encode differently with such a file. eos_ids: the tokens that the
    file names as the end of an answer, the first one as the end of a text; none: those in the model's files.
    Raises UserError.
    """
    files = files_to_convert(folder)
    system_safetensors.check(model_files.files_of(folder))
    script = llama_cpp_converter.home().resolve() / llama_cpp_converter.BASE_SCRIPT
    with output_folder.converting(output, folder) as (place, handle):
        model = _links(files, place / (folder.resolve().name or "model"))
        options = [llama_cpp_converter.ANY] if any_tokenizer else []
        options += [f"{llama_cpp_converter.EOS_IDS}{json.dumps(list(eos_ids))}"] if eos_ids else []
        options += [script, model, "--outtype", kind, "--outfile", place / output.name]
        llama_cpp_converter.run(options, folder, handle)
        system_files.put_file(place / output.name, output)
    return output


def adapter(folder: Path, base: Path, output: Path) -> Path:
    """Convert a peft adapter to a GGUF adapter in fp32; raises UserError.

    base: the folder of the transformers model that the adapter is for.
    """
    config = check_adapter(folder)
    files = files_to_convert(base)
    script = llama_cpp_converter.home().resolve() / llama_cpp_converter.ADAPTER_SCRIPT
    with output_folder.converting(output, folder) as (place, handle):
        links = _links([folder / name for name in ADAPTER_FILES], place / "adapter")
        if config.get("use_rslora") or config.get("alpha_pattern") or not config["lora_alpha"]:
            _scale_plainly(links, config)
        model = _links(files, place / "base")
        llama_cpp_converter.run(
            [script, "--base", model, "--outfile", place / output.name, links], folder, handle
        )
        system_files.put_file(place / output.name, output)
    return output


def quantize(source: Path, output: Path, kind: str) -> Path:
    """Convert a GGUF file of 16 or 32 bits to another type, with the quantiser of llama.cpp in a child."""
    with output_folder.converting(output, source) as (place, handle):
        path = place / output.name
        llama_cpp_converter.run(
            [source, path, kind], source, handle, "Quantising", llama_cpp_quantizer.__name__
        )
        system_files.put_file(path, output)
    return output


def _links(files: list[Path], folder: Path) -> Path:
    """A folder with links to these files only, so that the converter does not see code beside them."""
    folder.mkdir()
    for path in files:
        (folder / path.name).symlink_to(path.resolve())
    return folder


def files_to_convert(folder: Path) -> list[Path]:
    """The files of a model folder that the converter reads; raises UserError when it is no model folder."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not (folder / model_files.MODEL_CONFIG).is_file() or not any(
        p.suffix == ".safetensors" for p in files
    ):
        problem = f"{folder}: this is not a model folder with config.json and .safetensors files."
        raise UserError(problem, "Name a folder that transformers wrote, or a .gguf file.", USAGE)
    return files


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of an adapter that can become a GGUF file; raises UserError (exit 4) if not."""
    from safetensors import SafetensorError, safe_open

    def refuse(problem: str, fix: str = "") -> UserError:
        return UserError(f"{folder}: {problem}", fix, CHECKPOINT)

    system_safetensors.check(folder.glob(model_files.ADAPTER_WEIGHTS))
    try:
        config = json.loads((folder / model_files.ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / model_files.ADAPTER_WEIGHTS, "np") as file:
            names = list(file.keys())
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(isinstance(alpha, int | float) for alpha in alphas):
            raise ValueError("an alpha is not a number")
        for pattern in config.get("alpha_pattern") or {}:
            re.compile(pattern)
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(RecursionError, re.error, SafetensorError),
    ) as error:
        fix = "Name an adapter folder that peft wrote."
        raise refuse(f"the adapter cannot be read ({error}).", fix) from None
    if config.get("peft_type", "LORA") != "LORA":
        raise refuse("this is not a LoRA adapter, and llama.cpp has no others.")
    reasons = [words for key, words in NO_PLACE.items() if config.get(key)]
    if config.get("init_lora_weights", True) not in runs_folder.PLAIN_STARTS:
        start = config["init_lora_weights"]
        reasons.append(f"the initialisation {start!r}, which changed the weights of the base")
    reasons += [f"the tensor {name}" for name in names if not re.search(r"\.lora_[AB]\.weight$", name)]
    if reasons:
        raise refuse(f"an adapter with {reasons[0]} cannot become a GGUF adapter.")
    return config


def _scale_plainly(folder: Path, config: dict[str, Any]) -> None:
    """Multiply each B by its scale, because a GGUF adapter has only one alpha, divided by the rank.

    rsLoRA divides by the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732), and alpha_pattern
    has several alphas.
    """
    from safetensors.torch import load_file, save_file

    from onecard.models import adapter as models_adapter

    tensors = load_file(folder / model_files.ADAPTER_WEIGHTS)
    patterns = config.get("alpha_pattern") or {}
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        rank = tensors[name].shape[-1]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        alpha = models_adapter.pattern_value(patterns, module, config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors[name] = tensors[name].float() * scale
    for name in ADAPTER_FILES:
        (folder / name).unlink()  # the link
    save_file(tensors, folder / model_files.ADAPTER_WEIGHTS)
    plain = {**config, "lora_alpha": 0, "use_rslora": False, "alpha_pattern": {}}  # 0: B as it is
    (folder / model_files.ADAPTER_CONFIG).write_text(json.dumps(plain), encoding="utf-8")
