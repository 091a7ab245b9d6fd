"""GGUF files for llama.cpp from a model folder and its adapters, made once and kept in the user's cache."""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path

from onecard import errors
from onecard.conversion import gguf
from onecard.conversion.gguf import ADAPTER_FILES, FOLDER
from onecard.errors import UserError
from onecard.hub import model_files
from onecard.inference import gguf_check
from onecard.runs import folder as runs_folder
from onecard.system import files as system_files
from onecard.system import hashing

ENGINE = "Use --engine transformers."
WAY = "2"  # is increased when files in the cache should be made again


def for_llama(model: Path, adapters: Mapping[str, Path]) -> tuple[Path, dict[str, Path]]:
    """The GGUF files of a model folder and of adapters by name; files that exist already are used again.

    A key stands for the contents that a file was made from, so an adapter that changed is converted again.
    """
    of_base = keys(model)[0]
    place = system_files.cache_folder() / "gguf"
    path = place / of_base / "base.gguf"  # never from an adapter's folder, which may come from anybody
    if not path.is_file():
        with errors.remedy(ENGINE, beside=True):
            gguf.base(model, path, any_tokenizer=True)
    files = {}
    for name, folder in adapters.items():
        with errors.remedy(ENGINE):
            gguf.check_adapter(folder)
        key = keys(model, folder)[1]
        files[name] = _exported(folder, of_base, key) or place / key / "adapter.gguf"
        if not files[name].is_file():
            with errors.remedy(ENGINE, beside=True):
                gguf.adapter(folder, model, files[name])
    return path, files


def keys(model: Path, adapter: Path | None = None) -> tuple[str, str | None]:
    """A key for the contents that the GGUF file of the base is made from, and one for the adapter's."""
    version = gguf_check.version()
    of_base = _key(version, gguf.files_to_convert(model))
    if adapter is None:
        return of_base, None
    configured = _key(version, [model / model_files.MODEL_CONFIG])
    return of_base, _key(version + configured, [adapter / each for each in ADAPTER_FILES])


def _exported(folder: Path, of_base: str, of_adapter: str) -> Path | None:
    """The adapter's GGUF file that tools/export_gguf.py made from the same contents; None without one.

    It lies in the adapter's folder, or for a checkpoint in its run's folder, beside a base of any type.
    """
    parents = [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]
    for place in (path for parent in parents for path in sorted(parent.glob(f"{FOLDER}-*"))):
        values = None
        with contextlib.suppress(UserError):  # a damaged export is passed over, and a new file is made
            values = system_files.read_json(place / runs_folder.EXPORT)
        if not isinstance(values, dict):
            continue
        name, made_of = values.get("adapter"), (values.get("of_base"), values.get("of_adapter"))
        is_beside = isinstance(name, str) and Path(name).name == name
        if made_of == (of_base, of_adapter) and is_beside and (place / name).is_file():
            return place / name
    return None


def _key(version: str, files: list[Path]) -> str:
    content = hashing.of_folder(files)
    return hashlib.sha256(f"{version} {WAY} {content}".encode()).hexdigest()[:32]
