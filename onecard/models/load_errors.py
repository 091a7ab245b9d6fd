"""Turns what transformers raises for a base model that cannot be loaded into a message and an exit code."""

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from onecard.errors import CHECKPOINT, MEMORY, USAGE, UserError, first_line
from onecard.hub import remote_code

# what transformers raises for a folder that holds no model or a damaged one
NOT_A_MODEL = (
    *(OSError, ValueError, KeyError, TypeError, RecursionError),
    *(SafetensorError, StrictDataclassError),
)


def cannot_load(path: str, what: str, error: Exception) -> UserError:
    """The error for the user. path: the model; what: the part of it that cannot be loaded.

    error: one of NOT_A_MODEL. The exit code is 8 for a model that needs its own code, 6 for one that does not
    fit into memory, 4 for a damaged one, and 2 otherwise.
    """
    if "trust_remote_code" in str(error):
        return remote_code.needs_consent(path, what)
    if remote_code.NO_ROOM in str(error):
        return UserError(f"{path} does not fit into the memory of the GPUs.", code=MEMORY)
    fix, code = "Give a model folder, a hub name, or demo.", USAGE
    if _should_load(path):
        fix, code = "Download or convert it again.", CHECKPOINT
    return UserError(f"{path}: cannot load {what}: {first_line(error)}", fix, code)


def _should_load(path: str) -> bool:
    """Whether a folder has settings and weights of a kind that transformers knows, which must be damaged."""
    folder = Path(path)
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors*")):
        return False
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return True
    return not isinstance(kind, str) or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
