"""Reads older checkpoint folders, those of transformers' Trainer and of Chinese-Vicuna, and changes nothing.

It reads the weights, the optimizer's moments, the step and the planned steps. Pickled files are read by a
child process that knows only tensors and plain values, so a hostile file runs no code.
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

from onecard.errors import CHECKPOINT, DISK, UNSAFE, UserError
from onecard.hub.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from onecard.runs.checkpoint import flattened
from onecard.system import files as system_files
from onecard.system import sandbox
from onecard.system.safetensors import read_tensors

PICKLED_WEIGHTS = ("adapter_model.bin", "pytorch_model.bin")
STATE, OPTIMIZER, SCALER = "trainer_state.json", "optimizer.pt", "scaler.pt"
MARKS = (STATE, OPTIMIZER, *PICKLED_WEIGHTS)  # a folder with any of these is an older checkpoint
NAME = re.compile(r"(?P<module>.*\.(?P<last>[^.]+))\.lora_(?P<side>[AB])(\.default)?\.weight")
PLAIN = torch.Tensor | int | float  # types of values in an optimizer's state
SECONDS, MEMORY = 600, 8 << 30  # limits of the child; bytes in addition to twice the size of its file
ZIP = b"PK\x03\x04"  # the first bytes of a zip file, by which torch recognises one
OLDEST_TORCH = (2, 10)  # in older versions a file can run code despite weights_only (CVE-2026-24747)


@dataclasses.dataclass
class Legacy:
    """The content of an older checkpoint."""

    tensors: dict[str, torch.Tensor]  # adapter, under peft's portable names
    rank: int
    alpha: float | None  # None when no file says it
    targets: str  # module names with commas between
    step: int
    updates: int  # steps that changed the adapter; the learning rate follows these
    planned_steps: int | None
    optimizer: dict[str, Any] | None  # flat, as checkpoint.restore_optimizer takes it
    next_rate: float | None  # learning rate of the next step, when the optimizer says it
    scale: float | None  # of the fp16 loss scaler
    notes: list[str]


def is_legacy(folder: Path) -> bool:
    """Whether a folder is an older checkpoint."""
    return any((folder / name).is_file() for name in MARKS)


def read(folder: Path) -> Legacy:
    """Read an older checkpoint; raises UserError: exit 4 when it is damaged, 8 when a file would run code."""
    notes: list[str] = []
    tensors = _adapter(folder)
    ranks = {t.shape[0] for name, t in tensors.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise UserError(
            f"{folder}: the layers of its adapter have the ranks {sorted(ranks)}; all need the same rank.",
            "",
            CHECKPOINT,
        )
    targets = sorted({NAME.fullmatch(name)["last"] for name in tensors})
    state = _json(folder / STATE)
    settings = _json(folder / ADAPTER_CONFIG)
    step = _whole(state.get("global_step"))
    moments = rate = scale = None
    if (folder / OPTIMIZER).is_file():
        saved = unpickle(folder / OPTIMIZER)
        moments, rate = _moments(saved) or None, _next_rate(saved)
    if (folder / SCALER).is_file():
        saved = unpickle(folder / SCALER)
        scale = saved.get("scale") if isinstance(saved, dict) else None
        scale = scale if isinstance(scale, int | float) else None
    if settings.get("r", next(iter(ranks))) not in list(ranks):
        notes.append(f"{ADAPTER_CONFIG} says rank {settings['r']}; the tensors' rank {min(ranks)} is used")
    return Legacy(
        tensors=tensors,
        rank=ranks.pop(),
        alpha=settings.get("lora_alpha"),
        targets=",".join(targets),
        step=step,
        updates=_updates(moments or {}, step),
        planned_steps=_whole(state.get("max_steps")) or None,
        optimizer=moments,
        next_rate=rate,
        scale=scale,
        notes=notes,
    )


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / ADAPTER_WEIGHTS
    if path.is_file():
        saved = read_tensors(path)
    else:
        path = next((folder / name for name in PICKLED_WEIGHTS if (folder / name).is_file()), None)
        if path is None:
            raise UserError(f"{folder}: the folder holds no adapter weights.", "", CHECKPOINT)
        saved = unpickle(path)
    if not isinstance(saved, dict):
        raise UserError(f"{path}: the file holds no named tensors.", "", CHECKPOINT)
    adapter = {}
    for name, tensor in saved.items():
        match = NAME.fullmatch(str(name))
        if match and isinstance(tensor, torch.Tensor) and tensor.dim() == 2:
            adapter[f"{match['module']}.lora_{match['side']}.weight"] = tensor.float()
    other = [
        str(name)
        for name in saved
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
    """The moments as checkpoint.restore_optimizer takes them, parameters numbered in the model's order."""
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or not all(isinstance(number, int) for number in states):
        return {}
    numbered = dict(enumerate(state for _, state in sorted(states.items())))
    return {path: value for path, value in flattened(numbered) if isinstance(value, PLAIN)}


def _next_rate(saved: dict[str, Any]) -> float | None:
    """The learning rate in an optimizer's saved state: its scheduler has set that of the next step."""
    groups = saved.get("param_groups") if isinstance(saved, dict) else None
    rates = [group.get("lr") for group in groups or [] if isinstance(group, dict)]
    return float(rates[0]) if rates and isinstance(rates[0], float | int) else None


def _updates(moments: dict[str, Any], step: int) -> int:
    """Updates up to `step` by the optimizer's own count, which lacks those that fp16 skipped."""
    counts = {int(value) for name, value in moments.items() if name.endswith(".step")}
    return counts.pop() if len(counts) == 1 and 0 < min(counts) <= step else step


def first_moment(moments: dict[str, Any], number: int) -> torch.Tensor | None:
    """The first moment of parameter `number` from torch or bitsandbytes; None when the second is missing."""
    start, ends = f"{number}.", (".exp_avg", ".state1")
    names = (name for name in moments if name.startswith(start) and name.endswith(ends))
    name = next(names, "")
    second = name.replace(".exp_avg", ".exp_avg_sq").replace(".state1", ".state2")
    return moments.get(name) if second in moments else None


def is_bitsandbytes(moments: dict[str, Any]) -> bool:
    """Whether an optimizer of bitsandbytes has written these moments."""
    return any(name.endswith(".state1") for name in moments)


def _whole(value: Any) -> int:
    """The value if it is a positive whole number, else 0."""
    return value if isinstance(value, int) and value > 0 else 0


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}).", "", CHECKPOINT) from None


def unpickle(path: Path) -> dict[str, Any]:
    """The content of a pickled file, read by a child process that knows only tensors and plain values.

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
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if not numbers or (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        problem = f"{path}: the file is pickled, and such a file can make torch {version} run code."
        fix = "Use torch 2.10 or newer (CVE-2026-24747), or save the file as safetensors."
        raise UserError(problem, fix, UNSAFE)


def _split(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A value as JSON, in which tensors are numbers of `tensors`; the type of each key stands beside it."""
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
    """The work of the child: torch's restricted unpickler, then a file of safetensors and one of JSON."""
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
        with system_files.os_errors():
            save_file(tensors, f"{output}.safetensors")
        Path(f"{output}.json").write_text(tree, encoding="utf-8")
    except pickle.UnpicklingError as error:
        print(str(error).replace("\n", " ")[:300], file=sys.stderr)
        return CHECKPOINT if "invalid load key" in str(error) else UNSAFE
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        return DISK if error.errno in system_files.REFUSED else CHECKPOINT
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " ")[:300], file=sys.stderr)
        return CHECKPOINT
    return 0


def _check_records(source: str) -> None:
    """Compare the checksums of a zip, which torch does not do; raises BadZipFile.

    A compressed record is refused: torch would return a tensor of memory that was never written.
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
