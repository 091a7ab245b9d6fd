"""The files of a LLaMA folder: which of the two layouts it has, which files hold its weights, its settings.

No file of weights is opened. conversion/meta_layout.py knows what the files contain.
"""

import json
from pathlib import Path
from typing import Any

from onecard.config.conversion import TO_HF, TO_META
from onecard.errors import CHECKPOINT, UserError
from onecard.hub import model_files
from onecard.hub.model_files import MODEL_CONFIG

PARAMS = "params.json"


def layout_of(folder: Path) -> str:
    """Which layout a folder has, TO_HF or TO_META; raises UserError (exit 2) when it has neither."""
    if any(folder.glob("consolidated*.pth")) or (folder / PARAMS).is_file():
        return TO_META
    if (folder / MODEL_CONFIG).is_file():
        return TO_HF
    problem = f"--input_dir {folder}: has neither {PARAMS} with consolidated.00.pth nor {MODEL_CONFIG}."
    raise UserError(problem, "Name the folder of a LLaMA model.")


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights; it opens none of them.

    Raises UserError (exit 4) when a file is missing, or when there is one too many.
    """
    if layout_of(folder) == TO_HF:
        files = model_files.files_of(folder)
        strange = sorted(set(folder.glob("model*.safetensors")) - set(files))
        if strange:
            problem = f"{strange[0]} does not belong to the model in its folder."
            raise UserError(problem, "Move the file away; it may come from another download.", CHECKPOINT)
        return files
    present = sorted(folder.glob("consolidated*"))
    expected = [folder / f"consolidated.{number:02d}.pth" for number in range(len(present))]
    if not present:
        raise UserError(f"{folder}: consolidated.00.pth is missing.", "Download it again.", CHECKPOINT)
    if present != expected:
        odd = next(path for path in present if path not in expected)
        missing = next(path.name for path in expected if path not in present)
        problem = f"{folder}: there is {odd.name}, but {missing} is missing."
        fix = "The files of a model are numbered from 00 without gaps; download the missing ones."
        raise UserError(problem, fix, CHECKPOINT)
    if not (folder / PARAMS).is_file():
        raise UserError(f"{folder}: {PARAMS} is missing.", "Download it again.", CHECKPOINT)
    return present


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises UserError (exit 4) when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{path} cannot be read ({error})."
        raise UserError(problem, "Download it again.", CHECKPOINT) from None
    return content
