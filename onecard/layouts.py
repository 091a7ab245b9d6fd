"""Which files a model folder has, in transformers' layout or LLaMA's original one; none of them is opened."""

import json
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PARAMS, CONFIG = "params.json", "config.json"
TO_HF, TO_META = "hf", "meta"
# names of what transformers loads, as patterns, and what of them it leaves alone
TENSORS, SETTINGS = ("*.safetensors",), ("*.json", "*.txt", "*.model", "*.jinja")
NOT_LOADED = ("*/*", "consolidated*")


def files_of(folder: Path) -> list[Path]:
    """The files with a model's weights; raises UserError: exit 2 without any, 4 when some are missing."""
    if (folder / INDEX).is_file():
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
            names = sorted(set(listed))
            paths = [folder / name for name in names if Path(name).name == name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX}: damaged ({error}).", "Fetch it again.", CHECKPOINT) from None
        if len(paths) != len(names) or not paths:
            raise UserError(
                f"{folder / INDEX}: names no files of this folder.", "Fetch it again.", CHECKPOINT
            )
    elif (folder / WEIGHTS).is_file():
        paths = [folder / WEIGHTS]
    else:
        problem = f"{folder}: has neither {WEIGHTS} nor {INDEX}."
        raise UserError(problem, "Name a model folder with safetensors weights.")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} is missing.", "Fetch it again.", CHECKPOINT)
    return paths


def layout_of(folder: Path) -> str:
    """Which layout a folder has; raises UserError (exit 2) when it has neither."""
    if any(folder.glob("consolidated*.pth")) or (folder / PARAMS).is_file():
        return TO_META
    if (folder / CONFIG).is_file():
        return TO_HF
    problem = f"--input_dir {folder}: has neither {PARAMS} with consolidated.00.pth nor {CONFIG}."
    raise UserError(problem, "Name the folder of a LLaMA model.")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, none of them opened; raises UserError when one is missing or too many."""
    if layout_of(folder) == TO_HF:
        files = files_of(folder)
        strange = sorted(set(folder.glob("model*.safetensors")) - set(files))
        if strange:
            problem = f"{strange[0]}: is not one of the model's files."
            raise UserError(problem, "Two downloads in one folder? Move it away.", CHECKPOINT)
        return files
    found = sorted(folder.glob("consolidated*"))
    wanted = [folder / f"consolidated.{number:02d}.pth" for number in range(len(found))]
    if not found:
        raise UserError(f"{folder}: consolidated.00.pth is missing.", "Fetch it again.", CHECKPOINT)
    if found != wanted:
        odd = next(path for path in found if path not in wanted)
        missing = next(path.name for path in wanted if path not in found)
        problem = f"{folder}: {missing} is missing, and {odd.name} is there."
        raise UserError(problem, "Shards are numbered from 00, without gaps.", CHECKPOINT)
    if not (folder / PARAMS).is_file():
        raise UserError(f"{folder}: {PARAMS} is missing.", "Fetch it again.", CHECKPOINT)
    return found


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error}).", "Fetch it again.", CHECKPOINT) from None
    return content
