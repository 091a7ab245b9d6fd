"""The name of a model, an adapter or a dataset becomes a folder; `demo` is the demo model (demo.py).

Names of the hub become folders at one commit, which is said; the weights are fetched by whoever reads them.
"""

from collections.abc import Callable
from pathlib import Path

from onecard.config.training import FORMATS
from onecard.errors import UserError, first_line
from onecard.hub import client, demo, model_files, revisions
from onecard.hub import session as hub_session
from onecard.hub.demo import DEMO, DEMO_FOLDER
from onecard.system.files import cache_folder

ADAPTER_PATTERNS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_model.bin",
    "finetune_config.json",
)
CHECK = "Check the name and the network"
MODELS = f"{CHECK}. Give a model folder, a hub name, or demo."


def locate(model_path: str) -> str:
    """Fetch what a name needs, and return the folder of the model; a path is returned as it is.

    `demo` is fetched on first use, of a model of the hub everything but the weights. For a name that
    tools/download.py has fetched it is that folder, at the commit of the download. Raises UserError.
    """
    if model_path != DEMO and not revisions.is_name(model_path):
        return model_path
    if model_path != DEMO:
        what = f"--model_path {model_path}: no such folder here, and as a model of the hub it"
        return _fetch(model_path, revisions.MODEL, model_files.SETTINGS, what, MODELS)
    folder = cache_folder() / DEMO_FOLDER
    if not folder.is_dir():
        demo.make_demo(folder)
    return str(folder)


def here(model_path: str) -> str | None:
    """The folder of a model that is on this machine; None when it would have to be fetched."""
    if Path(model_path).is_dir():
        return model_path
    if model_path == DEMO:
        folder = cache_folder() / DEMO_FOLDER
        return str(folder) if folder.is_dir() else None
    folder = revisions.at_hand(model_path)
    return str(folder) if folder else None


def fetch_model(name: str) -> str:
    """locate, and fetch the weights too: no pickles and no code. Raises UserError."""
    with hub_session.session():  # the weights are those of the commit that the name meant
        folder = locate(name)
        try:
            revisions.complete(Path(folder), model_files.TENSORS)
        except client.REFUSALS as error:
            raise _refusal(f"--model_path {name}: its weights", error, MODELS) from None
    return folder


def for_engine(engine: str) -> Callable[[str], str]:
    """How an engine locates its model: fetch_model for llama.cpp, which needs all files at once."""
    return fetch_model if engine == "llama.cpp" else locate


def fetch_adapter(name: str) -> str:
    """Fetch an adapter of the hub; its folder, of tools/download.py or in the hub's own cache."""
    what = f"{name}: no such folder here, and as an adapter of the hub it"
    return _fetch(name, revisions.MODEL, ADAPTER_PATTERNS, what, f"{CHECK}, or name a local folder.")


def fetch_dataset(name: str) -> str:
    """Fetch the rows of a dataset of the hub; its folder in the hub's own cache. No code of it is run."""
    patterns = tuple(f"*{ending}" for ending in FORMATS if ending != ".pkl")
    what = f"--data_path {name}: no such file here, and as a dataset of the hub it"
    return _fetch(name, revisions.DATASET, patterns, what, f"{CHECK}, or name a local file or folder.")


def fetch_text(name: str, pattern: str, fix: str) -> str:
    """Fetch some files of a dataset of the hub; its folder. fix: what the user does when that fails."""
    return _fetch(name, revisions.DATASET, (pattern,), f"{name}: this dataset of the hub", fix)


def _fetch(name: str, kind: str, patterns: tuple[str, ...], what: str, fix: str) -> str:
    try:
        return str(revisions.fetch(name, kind, patterns))
    except client.REFUSALS as error:
        raise _refusal(what, error, fix) from None


def _refusal(subject: str, error: Exception, fix: str) -> UserError:
    """The error to raise for a refusal; an error of this machine's disk is raised unchanged, for its code."""
    if client.is_local(error):
        raise error
    return UserError(f"{subject} cannot be fetched: {first_line(error)}", fix)
