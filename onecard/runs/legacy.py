"""Older checkpoint folders, read only: those of transformers' Trainer and of Chinese-Vicuna.

Weights, optimizer moments, place in the schedule and step arrive; nothing in the folder is changed. Pickled
files are read by a child process that knows tensors and plain values only: a hostile file runs nothing.
"""

import dataclasses
import json
import re
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from onecard.errors import CHECKPOINT, UNSAFE, UserError
from onecard.hub.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from onecard.runs.checkpoint import flattened
from onecard.system import sandbox
from onecard.system.safetensors import read_tensors

PICKLED_WEIGHTS = ("adapter_model.bin", "pytorch_model.bin")
STATE, OPTIMIZER, SCALER = "trainer_state.json", "optimizer.pt", "scaler.pt"
MARKS = (STATE, OPTIMIZER, *PICKLED_WEIGHTS)  # any of these makes a folder an older checkpoint
NAME = re.compile(r"(?P<module>.*\.(?P<last>[^.]+))\.lora_(?P<side>[AB])(\.default)?\.weight")
PLAIN = torch.Tensor | int | float  # of an optimizer's state
SECONDS, MEMORY = 600, 8 << 30  # of the child; bytes of its own beside twice its file
ZIP = b"PK\x03\x04"  # how a zip begins, and how torch knows one
OLDEST_TORCH = (2, 10)  # below it a file could run code in spite of weights_only (CVE-2026-24747)


@dataclasses.dataclass
class Legacy:
    """What an older checkpoint holds."""

    tensors: dict[str, torch.Tensor]  # adapter, under peft's portable names
    rank: int
    alpha: float | None  # None: nowhere written
    targets: str  # module names with commas between
    step: int
    planned_steps: int | None
    optimizer: dict[str, Any] | None  # flat, as checkpoint.restore_optimizer takes it
    scale: float | None  # of the fp16 loss scaler
    notes: list[str]


def is_legacy(folder: Path) -> bool:
    return any((folder / name).is_file() for name in MARKS)


def read(folder: Path) -> Legacy:
    """Read an older checkpoint; raises UserError: exit 4 when it is damaged, 8 when a file would run code."""
    notes: list[str] = []
    tensors = _adapter(folder)
    ranks = {t.shape[0] for name, t in tensors.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise UserError(f"{folder}: its adapter has ranks {sorted(ranks)}, not one.", "", CHECKPOINT)
    targets = sorted({NAME.fullmatch(name)["last"] for name in tensors})
    state = _json(folder / STATE)
    settings = _json(folder / ADAPTER_CONFIG)
    moments = scale = None
    if (folder / OPTIMIZER).is_file():
        moments = _moments(unpickle(folder / OPTIMIZER)) or None
    if (folder / SCALER).is_file():
        saved = unpickle(folder / SCALER)
        scale = saved.get("scale") if isinstance(saved, dict) else None
        scale = scale if isinstance(scale, int | float) else None
    if settings.get("r", next(iter(ranks))) not in list(ranks):
        notes.append(
            f"{ADAPTER_CONFIG} says rank {settings['r']}, its tensors have {min(ranks)}: theirs counts"
        )
    return Legacy(
        tensors=tensors,
        rank=ranks.pop(),
        alpha=settings.get("lora_alpha"),
        targets=",".join(targets),
        step=_whole(state.get("global_step")),
        planned_steps=_whole(state.get("max_steps")) or None,
        optimizer=moments,
        scale=scale,
        notes=notes,
    )


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        found = read_tensors(path)
    else:
        path = next((folder / name for name in PICKLED_WEIGHTS if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{folder}: holds no adapter weights.", "", CHECKPOINT)
        found = unpickle(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no tensors by name.", "", CHECKPOINT)
    adapter = {}
    for name, tensor in found.items():
        match = NAME.fullmatch(str(name))
        if match and isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
            adapter[f"{match['module']}.lora_{match['side']}.weight"] = tensor.float()
    other = [
        str(name)
        for name in found
        if "modules_to_save" in str(name) or ("lora_" in str(name) and not NAME.fullmatch(str(name)))
    ]
    if other:
        problem = f"{path}: holds more than a plain LoRA adapter ({other[0]})."
        raise UserError(problem, "Only plain LoRA adapters can be trained further.", CHECKPOINT)
    if not adapter:
        problem = f"{path}: holds no LoRA tensor ({path.stat().st_size} bytes)."
        raise UserError(problem, "Such files came from saving an adapter twice; take another.", CHECKPOINT)
    return adapter


def _moments(saved: dict[str, Any]) -> dict[str, Any]:
    """The moments in our flat form; the numbers are those of the parameters in the model's order."""
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or not all(isinstance(number, int) for number in states):
        return {}
    numbered = dict(enumerate(state for _, state in sorted(states.items())))
    return {path: value for path, value in flattened(numbered) if isinstance(value, PLAIN)}


def first_moment(moments: dict[str, Any], number: int) -> torch.Tensor | None:
    """The first moment of parameter `number`, under torch's or bitsandbytes' name; None without a second."""
    start, ends = f"{number}.", (".exp_avg", ".state1")
    names = (name for name in moments if name.startswith(start) and name.endswith(ends))
    name = next(names, "")
    second = name.replace(".exp_avg", ".exp_avg_sq").replace(".state1", ".state2")
    return moments.get(name) if second in moments else None


def is_bitsandbytes(moments: dict[str, Any]) -> bool:
    return any(name.endswith(".state1") for name in moments)


def _whole(value: Any) -> int:
    """A number of steps; 0 for what is none."""
    return value if isinstance(value, int) and value > 0 else 0


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}).", "", CHECKPOINT) from None


def unpickle(path: Path) -> dict[str, Any]:
    """Content of a pickled file, through a child process that only knows tensors and plain values.

    Raises UserError: exit 8 when the file asks for anything else, 4 when it cannot be read.
    """
    check_torch(torch.__version__, path)
    with tempfile.TemporaryDirectory(prefix="onecard-legacy-") as place:
        output = Path(place) / "plain"
        sandbox.convert(__name__, path, output, SECONDS, damaged=CHECKPOINT, late=UNSAFE)
        tensors = load_file(output.with_suffix(".safetensors"))
        tree = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
        return _join(tree, tensors)


def check_torch(version: str, path: Path) -> None:
    """Raise UserError (exit 8) where torch's restricted unpickler is known to be unsafe."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        problem = f"{path}: pickled, and torch {version} can be made to run code by such a file."
        fix = "Use torch 2.10 or newer (CVE-2026-24747), or save it as safetensors."
        raise UserError(problem, fix, UNSAFE)


def _split(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Plain values as JSON, tensors by their number: a key's type is kept beside it."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        items = [[isinstance(key, int), str(key), _split(inner, tensors)] for key, inner in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        return {"list": [_split(inner, tensors) for inner in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    return {"plain": None}


def _join(tree: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Any:
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "dict" in tree:
        return {int(key) if whole else key: _join(inner, tensors) for whole, key, inner in tree["dict"]}
    if "list" in tree:
        return [_join(inner, tensors) for inner in tree["list"]]
    return tree["plain"]


def _child(source: str, output: str) -> int:
    """What the child does: torch's restricted unpickler, then safetensors and JSON."""
    import pickle
    import resource

    from safetensors.torch import save_file

    size = Path(source).stat().st_size
    sandbox.limit(resource.RLIMIT_NPROC, 0)  # no process of its own
    sandbox.limit(resource.RLIMIT_DATA, MEMORY + 2 * size)
    torch.set_num_threads(1)
    try:
        value = torch.load(source, map_location="cpu", weights_only=True)
        _check_records(source)
        tensors: dict[str, torch.Tensor] = {}
        tree = json.dumps(_split(value, tensors))
        save_file(tensors, f"{output}.safetensors")
    except pickle.UnpicklingError as error:
        print(str(error).replace("\n", " ")[:300], file=sys.stderr)
        return CHECKPOINT if "invalid load key" in str(error) else UNSAFE
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " ")[:300], file=sys.stderr)
        return CHECKPOINT
    Path(f"{output}.json").write_text(tree, encoding="utf-8")
    return 0


def _check_records(source: str) -> None:
    """Compare the checksums of a zip, where it has any, which torch does not; raises BadZipFile.

    A record that is called compressed torch fills with whatever memory it gets.
    """
    with open(source, "rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return  # a format before torch 1.6, which has none
    with zipfile.ZipFile(source) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise zipfile.BadZipFile(f"{packed[0]} is compressed")
        unsummed = not any(entry.CRC for entry in archive.infolist())  # torch's set_crc32_options(False)
        bad = None if unsummed else archive.testzip()
        if bad:
            raise zipfile.BadZipFile(f"{bad} has another checksum")


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1], sys.argv[2]))
