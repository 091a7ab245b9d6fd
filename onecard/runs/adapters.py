"""What --lora_path names -> the folder of an adapter, with the base and the template that are recorded there.

The path may be a folder that peft wrote, a run (its published adapter, or its best or newest checkpoint), an
older folder without adapter_config.json or with a pickled file, a .gguf file, or a hub name. Nothing in these
folders is changed.
"""

import contextlib
import dataclasses
import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from onecard.config.generation import BASE, MIX
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import locate, model_files, revisions
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy
from onecard.runs import log as runs_log
from onecard.system import files as system_files

BEST = "best"
GGUF = ".gguf"


@dataclasses.dataclass
class Adapter:
    """An adapter, or a model that was trained as a whole."""

    name: str  # in windows and after /adapter
    folder: (
        Path  # with adapter_config.json and adapter_model.safetensors, or a model's folder, or a .gguf file
    )
    whole: bool = False  # whether this is a whole model
    base: str | None = None  # the base that is recorded with it; a hub name has its commit
    version: str | None = None  # of the base, if its run recorded one; it may come from ModelScope
    template: dict[str, Any] | str | None = None  # its texts or its name, if recorded
    notes: list[str] = dataclasses.field(default_factory=list)  # what the user should be told
    original: Path | None = None  # the user's folder, if `folder` is a copy in the layout of peft
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)  # that its run recorded
    bits: int | None = None  # of the base's weights in its run

    @property
    def origin(self) -> Path:
        """The folder or file as the user knows it."""
        return self.original or self.folder

    @property
    def record(self) -> str | None:
        """The version of the base that was trained on; the base in use is compared with it."""
        return self.version or self.base

    @property
    def is_gguf(self) -> bool:
        return self.folder.suffix == GGUF


class AdapterPath(NamedTuple):
    """An adapter as a user names it."""

    name: str
    path: str  # a folder, a .gguf file or a hub name
    weight: float | None  # None where none is written


def read_list(lora_path: str | None) -> list[AdapterPath]:
    """The adapters in NAME=PATH:WEIGHT,NAME=PATH:WEIGHT; raises UserError for a name that is reserved."""
    listed: list[AdapterPath] = []
    for text in filter(None, (part.strip() for part in (lora_path or "").split(","))):
        named = re.match(r"([\w.-]+)=(.+)", text)
        name, path = (named[1], named[2]) if named else ("", text)
        weighted = re.fullmatch(r"(.+):(-?\d+(?:\.\d+)?)", path)
        path, weight = (weighted[1], float(weighted[2])) if weighted else (path, None)
        name = name or short_name(path)
        if name in (BASE, MIX):
            raise UserError(f"--lora_path: an adapter cannot be called {name}.", f"Write NAME={path}.")
        taken = {other for other, _, _ in listed}
        while name in taken:
            name += "+"
        listed.append(AdapterPath(name, path, weight))
    return listed


def short_name(path: str) -> str:
    """A name for the adapter at a path: the last part of the path, for a checkpoint its run's name too."""
    parts = Path(path.rstrip("/")).parts or (path,)
    parts = (*parts[:-1], revisions.split(parts[-1])[0])  # without the revision of a hub name
    last = parts[-1] if not parts[-1].startswith("checkpoint-") else "-".join(parts[-2:])
    return re.sub(r"[^\w.-]+", "-", last) or "adapter"


def find(path: str, name: str, which: str, keep: Path) -> Adapter:
    """The adapter or model at a path or hub name; raises UserError when there is none, or a damaged one.

    which: "best" or "newest", the checkpoint of an unfinished run; keep: a folder for adapters that have to
    be rewritten in the layout of peft first.
    """
    local = Path(path).expanduser()
    if local.suffix == GGUF and local.is_file():
        return _exported(local.parent, local, name)
    if (local / runs_folder.EXPORT).is_file():
        return _exported(local, None, name)
    folder = local if local.is_dir() else Path(locate.fetch_adapter(path))
    adapter = _find(folder, name, which, keep)
    stored = _object(folder / runs_folder.CONFIG)
    if not stored and ((folder / runs_checkpoint.MANIFEST).is_file() or folder.name == runs_folder.MODEL):
        stored = _object(folder.parent / runs_folder.CONFIG)
    options = stored.get("options") or {}
    if options.get("model_path"):
        adapter.version = (stored.get("resolved") or {}).get("base")
        adapter.base = revisions.recorded(options["model_path"], adapter.version, stored=True)
    adapter.bits = options.get("bits")
    adapter.fingerprints = stored.get("fingerprints") or {}
    adapter.template = (stored.get("resolved") or {}).get("template") or _first(options.get("template"))
    return adapter


def _exported(folder: Path, file: Path | None, name: str) -> Adapter:
    """A GGUF adapter, with the base and template that export.json records; file None: the one named there."""
    values = _object(folder / runs_folder.EXPORT)
    names = {key: values.get(key) for key in ("base", "adapter")}
    if not all(
        file_name is None or (isinstance(file_name, str) and Path(file_name).name == file_name)
        for file_name in names.values()
    ):
        raise UserError(f"{folder / runs_folder.EXPORT}: damaged.", "Export the model again.", CHECKPOINT)
    base = str((folder / names["base"]).resolve()) if names["base"] else None
    if file is None and not names["adapter"]:
        return Adapter(name, Path(base or folder), whole=True)
    if file is not None and file.name != names["adapter"]:
        return Adapter(name, file)
    return Adapter(name, folder / names["adapter"], base=base, template=values.get("template"))


def _object(path: Path) -> dict[str, Any]:
    """A JSON object, {} when there is no such file; raises UserError (exit 4) when it is damaged."""
    values = system_files.read_json(path, "Take another copy of the adapter.")
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: damaged (no JSON object).", "Take another copy of the adapter.", CHECKPOINT)
    return values or {}


def _find(folder: Path, name: str, which: str, keep: Path) -> Adapter:
    has_config = (folder / model_files.ADAPTER_CONFIG).is_file()
    if has_config and (folder / model_files.ADAPTER_WEIGHTS).is_file():
        return _as_it_is(folder, name)
    if (folder / runs_folder.MODEL / model_files.MODEL_CONFIG).is_file():
        return Adapter(name, folder / runs_folder.MODEL, whole=True)
    if (folder / runs_folder.CONFIG).is_file():
        chosen, note = _of_run(folder, which)
        adapter = _as_it_is(chosen, name)
        adapter.notes.append(note)
        return adapter
    if (folder / model_files.MODEL_WEIGHTS).is_file() and (folder / model_files.MODEL_CONFIG).is_file():
        return _as_it_is(folder, name)
    if legacy.is_legacy(folder) or (folder / model_files.ADAPTER_WEIGHTS).is_file():
        return _from_older(folder, name, keep)
    problem = f"--lora_path {folder} holds neither an adapter ({model_files.ADAPTER_WEIGHTS}) nor a run."
    raise UserError(problem, "Name an adapter folder, a run folder or a hub name.", CHECKPOINT)


def _as_it_is(folder: Path, name: str) -> Adapter:
    if (folder / runs_checkpoint.MANIFEST).is_file():
        runs_checkpoint.verify(folder)
    if not (folder / model_files.ADAPTER_CONFIG).is_file():  # a checkpoint of all weights
        return Adapter(name, folder, whole=True)
    values = _object(folder / model_files.ADAPTER_CONFIG)
    if values.get("peft_type", "LORA") != "LORA":
        problem = f"{folder / model_files.ADAPTER_CONFIG}: this is not a LoRA adapter."
        raise UserError(problem, "OneCard only uses LoRA adapters; name another one.", CHECKPOINT)
    return Adapter(name, folder, base=revisions.of_settings(values))


def _of_run(folder: Path, which: str) -> tuple[Path, str]:
    """A checkpoint of an unfinished run, and a note which one it is. A training there is not disturbed."""
    steps = sorted(runs_folder.checkpoint_steps(folder), reverse=True)
    best = runs_log.best_step(folder) if which == BEST else None
    for step in sorted(steps, key=lambda step: step != best):  # the best first, then the newest
        path = folder / f"checkpoint-{step}"
        with contextlib.suppress(UserError):
            runs_checkpoint.verify(path)
            which_one = "the best so far" if step == best else "the newest"
            return path, f"{folder} is not finished: {path.name} is used, {which_one}"
    problem = f"--lora_path {folder}: this run has no complete checkpoint yet."
    raise UserError(problem, "Wait until it saves its first one, or name another adapter.", CHECKPOINT)


def _from_older(folder: Path, name: str, keep: Path) -> Adapter:
    """An older adapter, rewritten in the layout of peft into a folder inside `keep`."""
    old = legacy.read(folder)
    place = Path(tempfile.mkdtemp(dir=keep))
    alpha = old.alpha if old.alpha is not None else 2.0 * old.rank
    notes = list(old.notes)
    if old.alpha is None:
        notes.append(f"{folder} does not record its alpha: {alpha:g} is used, twice its rank")
    prefix = "base_model.model."
    tensors = {
        key if key.startswith(prefix) else prefix + key: tensor.contiguous()
        for key, tensor in old.tensors.items()
    }
    save_file(tensors, place / model_files.ADAPTER_WEIGHTS)
    config = _object(folder / model_files.ADAPTER_CONFIG)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": old.rank,
        "lora_alpha": alpha,
        "target_modules": old.targets.split(","),
        "use_rslora": bool(config.get("use_rslora")),
        "inference_mode": True,
    }
    (place / model_files.ADAPTER_CONFIG).write_text(json.dumps(values), encoding="utf-8")
    return Adapter(name, place, base=config.get("base_model_name_or_path"), notes=notes, original=folder)


def _first(names: Any) -> str | None:
    return names.split(",")[0].strip() if isinstance(names, str) and names else None
