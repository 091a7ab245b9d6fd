"""Which files a model and an adapter have, in transformers' and peft's layout; no weights are opened."""

import json
from pathlib import Path

from onecard.errors import CHECKPOINT, UserError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS = "config.json", "model.safetensors"
INDEX = "model.safetensors.index.json"
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder / INDEX}: damaged ({error}).", "Fetch it again.", CHECKPOINT) from None
        if len(paths) != len(names) or not paths:
            raise UserError(
                f"{folder / INDEX}: names no files of this folder.", "Fetch it again.", CHECKPOINT
            )
    elif (folder / MODEL_WEIGHTS).is_file():
        paths = [folder / MODEL_WEIGHTS]
    else:
        problem = f"{folder}: has neither {MODEL_WEIGHTS} nor {INDEX}."
        raise UserError(problem, "Name a model folder with safetensors weights.")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing)} is missing.", "Fetch it again.", CHECKPOINT)
    return paths
