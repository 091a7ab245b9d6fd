"""A model folder and its adapters -> GGUF files for llama.cpp, made once and kept in the user's cache.

llama.cpp's own converter and quantiser do it (converter.py, quantizer.py). Nothing here knows engines or
conversations.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onecard import converter, fingerprint, headers, layouts, runfolder
from onecard.errors import CHECKPOINT, DISK, USAGE, UserError

MODEL_FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickles, no code
FOLDER = "gguf"  # with the type behind it: where tools/export_gguf.py puts its files
WAY = "2"  # changes when files that are kept should be made again
NO_PLACE = {  # of adapter_config.json: what a GGUF adapter cannot hold
    "use_dora": "DoRA",
    "modules_to_save": "trained embeddings",
    "fan_in_fan_out": "transposed weights",
    "lora_bias": "biases",
    "layer_replication": "repeated layers",
    "target_parameters": "parameters of experts",
    "alora_invocation_tokens": "a text that switches it on",
}
ADAPTER_FILES = (runfolder.ADAPTER_CONFIG, runfolder.ADAPTER_WEIGHTS)


def for_llama(model: Path, adapters: Mapping[str, Path]) -> tuple[Path, dict[str, Path]]:
    """Files for llama.cpp of a model folder and of adapters by name; those made before are found again.

    What they are made from is compared by content: an adapter that was trained on is converted again.
    """
    of_base = keys(model)[0]
    place = fingerprint.cache_folder() / "gguf"
    path = place / of_base / "base.gguf"  # an adapter's folder may be anybody's: no base is taken from there
    if not path.is_file():
        base(model, path, any_tokenizer=True)
    made = {}
    for name, folder in adapters.items():
        _check_adapter(folder)
        key = keys(model, folder)[1]
        made[name] = _exported(folder, of_base, key) or place / key / "adapter.gguf"
        if not made[name].is_file():
            adapter(folder, model, made[name])
    return path, made


def keys(model: Path, adapter: Path | None = None) -> tuple[str, str | None]:
    """What the files of a base and an adapter are made from, as a name each."""
    version = converter.version()
    of_base = _key(version, _model_files(model))
    if adapter is None:
        return of_base, None
    configured = _key(version, [model / runfolder.MODEL_CONFIG])
    return of_base, _key(version + configured, [adapter / each for each in ADAPTER_FILES])


def _exported(folder: Path, of_base: str, of_adapter: str) -> Path | None:
    """The adapter's file that tools/export_gguf.py made of just these.

    It lies in the adapter's folder, of a checkpoint in its run's, beside a base of any type.
    """
    places = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    for place in (found for each in places for found in sorted(each.glob(f"{FOLDER}-*"))):
        values = None
        with contextlib.suppress(UserError):  # a damaged one is no export; chat makes its own files
            values = runfolder.read_json(place / runfolder.EXPORT)
        if not isinstance(values, dict):
            continue
        name, made_of = values.get("adapter"), (values.get("of_base"), values.get("of_adapter"))
        is_beside = isinstance(name, str) and Path(name).name == name
        if made_of == (of_base, of_adapter) and is_beside and (place / name).is_file():
            return place / name
    return None


def base(
    folder: Path, output: Path, any_tokenizer: bool = False, kind: str = "f16", ends: Sequence[int] = ()
) -> Path:
    """Convert a transformers model folder to a GGUF file.

    kind: f32, f16, bf16, q8_0; auto: the 16 bits that the weights have. any_tokenizer: also one whose way of
    splitting text llama.cpp does not know; other programs would then encode with the file otherwise than
    OneCard, which brings the tokenizer. ends: tokens that the file names as those that end an answer, the
    first as the end of a text; none: what the model's files say. Raises UserError.
    """
    files = _model_files(folder)
    headers.check(layouts.files_of(folder))
    script = converter.home().resolve() / converter.BASE_SCRIPT
    with unfinished(output, folder) as (place, handle):
        model = _links(files, place / (folder.resolve().name or "model"))
        options = [converter.ANY] if any_tokenizer else []
        options += [f"{converter.ENDS}{json.dumps(list(ends))}"] if ends else []
        options += [script, model, "--outtype", kind, "--outfile", place / output.name]
        converter.run(options, folder, handle)
        _finish(place / output.name, output)
    return output


def adapter(folder: Path, base: Path, output: Path) -> Path:
    """Convert a peft adapter to a GGUF adapter in fp32; raises UserError.

    base: folder of the transformers model it is for.
    """
    config = _check_adapter(folder)
    files = _model_files(base)
    script = converter.home().resolve() / converter.ADAPTER_SCRIPT
    with unfinished(output, folder) as (place, handle):
        given = _links([folder / name for name in ADAPTER_FILES], place / "adapter")
        if config.get("use_rslora") or config.get("alpha_pattern") or not config["lora_alpha"]:
            _scale_plainly(given, config)
        model = _links(files, place / "base")
        converter.run([script, "--base", model, "--outfile", place / output.name, given], folder, handle)
        _finish(place / output.name, output)
    return output


def quantize(source: Path, output: Path, kind: str) -> Path:
    """Another type of weights for a GGUF file of 16 or 32 bits, by llama.cpp's quantiser in a child."""
    with unfinished(output, source) as (place, handle):
        made = place / output.name
        converter.run([source, made, kind], source, handle, "Quantising", "onecard.quantizer")
        _finish(made, output)
    return output


@contextlib.contextmanager
def unfinished(output: Path, source: Path) -> Iterator[tuple[Path, int]]:
    """A folder beside the output, and a handle that locks that place: one conversion at a time.

    What a killed one left there goes first.
    """
    parent = output.parent.resolve()  # the child has a working folder of its own
    try:
        parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            for left in parent.glob(f"{converter.UNFINISHED}*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=parent, prefix=converter.UNFINISHED) as place:
                yield Path(place), handle
        finally:
            os.close(handle)
    except OSError as error:
        problem = f"{source}: its GGUF file could not be stored in {output.parent}: {error.strerror}."
        raise UserError(problem, "Make room or check the rights.", DISK) from None


def _finish(made: Path, output: Path) -> None:
    runfolder.sync_file(made)
    made.replace(output)
    runfolder.sync_folder(output.parent)


def _links(files: list[Path], folder: Path) -> Path:
    """A folder of links to these files alone, so that no code beside them is found."""
    folder.mkdir()
    for path in files:
        (folder / path.name).symlink_to(path.resolve())
    return folder


def _key(version: str, files: list[Path]) -> str:
    content = fingerprint.of_folder(files)
    return hashlib.sha256(f"{version} {WAY} {content}".encode()).hexdigest()[:32]


def _model_files(folder: Path) -> list[Path]:
    """What the converter reads of a model folder; raises UserError when it is none."""
    files = sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()})
    if not (folder / runfolder.MODEL_CONFIG).is_file() or not any(p.suffix == ".safetensors" for p in files):
        problem = f"{folder}: no model folder with config.json and .safetensors files."
        raise UserError(problem, "Name a folder that transformers wrote, or a .gguf file.", USAGE)
    return files


def _check_adapter(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter that can become a GGUF file; raises UserError (exit 4) for others."""
    from safetensors import SafetensorError, safe_open

    def refuse(problem: str, fix: str = converter.ENGINE) -> UserError:
        return UserError(f"{folder}: {problem}", fix, CHECKPOINT)

    headers.check(folder.glob(runfolder.ADAPTER_WEIGHTS))
    try:
        config = json.loads((folder / runfolder.ADAPTER_CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / runfolder.ADAPTER_WEIGHTS, "np") as file:
            names = list(file.keys())
        alphas = [config["lora_alpha"], *(config.get("alpha_pattern") or {}).values()]
        if not all(isinstance(alpha, int | float) for alpha in alphas):
            raise ValueError("an alpha is no number")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise refuse(f"no adapter that can be read ({error}).", "Name an adapter folder of peft.") from None
    if config.get("peft_type", "LORA") != "LORA":
        raise refuse("not a LoRA adapter, which is all that llama.cpp has.")
    reasons = [what for key, what in NO_PLACE.items() if config.get(key)]
    if config.get("init_lora_weights", True) not in runfolder.PLAIN_STARTS:
        reasons.append(f"the start {config['init_lora_weights']!r}, which changed the base's weights")
    reasons += [f"the tensor {name}" for name in names if not re.search(r"\.lora_[AB]\.weight$", name)]
    if reasons:
        raise refuse(f"an adapter with {reasons[0]} cannot become a GGUF adapter.")
    return config


def _scale_plainly(folder: Path, config: dict[str, Any]) -> None:
    """Put scales into B that a GGUF adapter cannot say: it has one alpha, and divides it by the rank.

    rsLoRA divides by the rank's root (Kalajdzievski 2023, arXiv 2312.03732); alpha_pattern has several.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / runfolder.ADAPTER_WEIGHTS)
    patterns = config.get("alpha_pattern") or {}
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        rank = tensors[name].shape[-1]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
        found = (alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module))  # as peft
        scale = next(found, config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        tensors[name] = tensors[name].float() * scale
    for name in ADAPTER_FILES:
        (folder / name).unlink()  # the link
    save_file(tensors, folder / runfolder.ADAPTER_WEIGHTS)
    plain = {**config, "lora_alpha": 0, "use_rslora": False, "alpha_pattern": {}}  # 0: B as it is
    (folder / runfolder.ADAPTER_CONFIG).write_text(json.dumps(plain), encoding="utf-8")
