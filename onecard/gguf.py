"""A model folder and its adapters -> GGUF files for llama.cpp, made once and kept in the user's cache.

llama.cpp's own converter does it. It lies in the source archive of llama-cpp-python, so it is always that of
the installed version, and runs in a process of its own, without network and without the code that a model
folder may bring. This file does not know engines or conversations.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onecard import child, fingerprint, runfolder
from onecard.errors import CHECKPOINT, DISK, USAGE, UserError

PACKAGE = "llama-cpp-python"
BASE_SCRIPT, ADAPTER_SCRIPT = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
PARTS = (BASE_SCRIPT, ADAPTER_SCRIPT, "conversion/", "gguf-py/", "LICENSE")  # of the archive's llama.cpp
MODEL_FILES = ("model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # no pickles, no code
WAY = "1"  # changes when files that are kept should be made again
UNFINISHED = ".onecard-gguf-"
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
ENGINE = "Use --engine transformers."
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
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")  # others changed the base's weights too


def for_llama(model: Path, adapters: Mapping[str, Path]) -> tuple[Path, dict[str, Path]]:
    """Files for llama.cpp of a model folder and of adapters by name; those made before are found again.

    What they are made from is compared by content: an adapter that was trained on is converted again.
    """
    version = _version()
    of_base = _key(version, _model_files(model))
    configured = _key(version, [model / runfolder.MODEL_CONFIG])
    place = fingerprint.cache_folder() / "gguf"
    path = place / of_base / "base.gguf"
    if not path.is_file():
        base(model, path, any_tokenizer=True)
    made = {}
    for name, folder in adapters.items():
        _check_adapter(folder)
        key = _key(version + configured, [folder / each for each in ADAPTER_FILES])
        made[name] = place / key / "adapter.gguf"
        if not made[name].is_file():
            adapter(folder, model, made[name])
    return path, made


def base(folder: Path, output: Path, any_tokenizer: bool = False) -> Path:
    """Convert a transformers model folder to a GGUF file in 16 bits (fp16).

    any_tokenizer: also one whose way of splitting text llama.cpp does not know; other programs would then
    encode with the file otherwise than OneCard, which brings the tokenizer. Raises UserError.
    """
    files = _model_files(folder)
    script = converter().resolve() / BASE_SCRIPT
    with _unfinished(output, folder) as (place, handle):
        model = _links(files, place / (folder.resolve().name or "model"))
        options = [*(["--any-tokenizer"] if any_tokenizer else []), script, model]
        _run([*options, "--outtype", "f16", "--outfile", place / output.name], folder, handle)
        _finish(place / output.name, output)
    return output


def adapter(folder: Path, base: Path, output: Path) -> Path:
    """Convert a peft adapter to a GGUF adapter in fp32; raises UserError.

    base: folder of the transformers model it is for.
    """
    config = _check_adapter(folder)
    files = _model_files(base)
    script = converter().resolve() / ADAPTER_SCRIPT
    with _unfinished(output, folder) as (place, handle):
        given = _links([folder / name for name in ADAPTER_FILES], place / "adapter")
        if config.get("use_rslora") or config.get("alpha_pattern") or not config["lora_alpha"]:
            _scale_plainly(given, config)
        model = _links(files, place / "base")
        _run([script, "--base", model, "--outfile", place / output.name, given], folder, handle)
        _finish(place / output.name, output)
    return output


def converter() -> Path:
    """The folder with llama.cpp's converter of the installed version; fetched on first use."""
    folder = fingerprint.cache_folder() / f"llama.cpp-{_version()}"
    if folder.is_dir():
        return folder
    print(f"Fetching llama.cpp's converter (77 MB, once) into {folder} ...", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=UNFINISHED) as temporary:
            made = _unpack(_download(Path(temporary)), Path(temporary) / "made")
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except (OSError, tarfile.TarError) as error:
        problem = f"llama.cpp's converter could not be stored in {folder}: {error}."
        raise UserError(problem, "Set ONECARD_CACHE to a folder with 200 MB free.", DISK) from None
    return folder


def _version() -> str:
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{PACKAGE} is not installed.", "Run: bash tools/setup.sh cpu") from None


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder), f"{PACKAGE}=={_version()}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if ended.returncode or not archives:
        problem = f"llama.cpp's converter could not be fetched: {_last_words(ended.stderr)}"
        raise UserError(problem, "Check the network, or use --engine transformers.")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> Path:
    """The converter's parts of the archive, and nothing else of it."""
    with tarfile.open(archive) as packed:
        for member in packed:
            _, found, name = member.name.partition("/vendor/llama.cpp/")
            if found and name.startswith(PARTS):
                member.name = name
                packed.extract(member, folder, filter="data")
    missing = [name for name in PARTS if not (folder / name).exists()]
    if missing:
        raise UserError(f"{archive.name} has no {missing[0]}.", f"Install another version of {PACKAGE}.")
    return folder


def _run(arguments: list[Any], source: Path, handle: int) -> None:
    """Run a script of the converter; raises UserError with what it said last."""
    print(f"Converting {source} to GGUF (once) ...", flush=True)
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    ended = subprocess.run(
        [sys.executable, "-m", "onecard.gguf", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        pass_fds=[handle],  # so that the folder is locked as long as either lives
        env={**kept, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        **{**child.SETTINGS, "errors": "replace"},
    )
    if ended.returncode:
        reason = _last_words(ended.stdout) if ended.returncode > 0 else "killed, perhaps for want of memory"
        full = "No space left" in ended.stdout
        fix = "Make room, or set ONECARD_CACHE." if full else ENGINE
        raise UserError(f"{source}: cannot be converted to GGUF: {reason}", fix, DISK if full else CHECKPOINT)


def _last_words(said: str) -> str:
    """The last line that is no progress bar and no mere information."""
    lines = [line.strip() for line in re.split(r"[\r\n]", said)]
    noise = re.compile(r"INFO:|DEBUG:|WARNING:|Writing:")
    telling = [line for line in lines if line and not noise.match(line)]
    return re.sub(r"^ERROR:( |[\w.-]+:)", "", telling[-1])[:300] if telling else "it gave no reason"


@contextlib.contextmanager
def _unfinished(output: Path, source: Path) -> Iterator[tuple[Path, int]]:
    """A folder beside the output, and a handle that locks that place: one conversion at a time.

    What a killed one left there goes first.
    """
    parent = output.parent.resolve()  # the child has a working folder of its own
    try:
        parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(parent, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            for left in parent.glob(f"{UNFINISHED}*"):
                shutil.rmtree(left)
            with tempfile.TemporaryDirectory(dir=parent, prefix=UNFINISHED) as place:
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

    def refuse(problem: str, fix: str = ENGINE) -> UserError:
        return UserError(f"{folder}: {problem}", fix, CHECKPOINT)

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
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
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


def _converting(arguments: list[str]) -> None:
    """In the child: run a script of the converter, with its own libraries first."""
    any_tokenizer = arguments[0] == "--any-tokenizer"
    arguments = arguments[any_tokenizer:]
    home = Path(arguments[0]).parent
    sys.path[:1] = [str(home / "gguf-py"), str(home)]  # instead of the working folder
    sys.argv = arguments
    if any_tokenizer:
        from conversion.base import TextModel

        known = TextModel.get_vocab_base_pre

        def known_or_default(self: Any, tokenizer: Any) -> str:
            try:
                return known(self, tokenizer)
            except NotImplementedError:
                return "default"

        TextModel.get_vocab_base_pre = known_or_default
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    _converting(sys.argv[1:])
