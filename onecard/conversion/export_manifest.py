"""What an earlier export left in a folder, and whether another may come in its place.

Only what OneCard wrote there and nobody changed is replaced: by the same export, or in a run's own folder by
a later one of that run. Nothing here makes files.
"""

import json
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError, listed
from onecard.inference import gguf_check
from onecard.runs import folder as run_folder
from onecard.system import files as system_files
from onecard.system import hashing, output_folder

FLAG = "--output_path"
PARTS = {  # of export.json: what makes it another export
    "of_base": "base model",
    "of_adapter": "adapter",
    "template": "template",
    "ends": "set of end tokens",
}


def find(output: Path) -> dict[str, Any] | None:
    """export.json of an export that is there; raises UserError when something else is, or none can come."""
    place = output_folder.find(output, FLAG)
    try:
        values = system_files.read_json(place / run_folder.EXPORT) if place.is_dir() else None
    except UserError:
        problem = f"{FLAG} {output}: is there already, and its {run_folder.EXPORT} is damaged."
        raise UserError(problem, "Name a new folder, or delete this one.", CHECKPOINT) from None
    if isinstance(values, dict):
        return values
    output_folder.check_free(place, output, FLAG)
    return None


def is_done(place: Path, known: dict[str, Any], made_from: dict[str, Any], check: bool) -> bool:
    """Whether the same export is there, compared with the model if that is asked for."""
    if _difference(known, made_from) or (check and not known.get("check")):
        return False
    return not _damaged(*_left(place, known)[:2])


def edited(place: Path, known: dict[str, Any]) -> list[str]:
    """Files that were written there and say something else now; of the weights it would be damage."""
    return _texts(_left(place, known)[1])


def replaced(output: Path, known: dict[str, Any], made_from: dict[str, Any], is_own: bool) -> str:
    """Why the export there is made again, for the user; raises UserError (exit 2) when it has to stay.

    is_own: the folder is the one that a run has for its exports.
    """
    place, difference = output_folder.find(output, FLAG), _difference(known, made_from)
    if difference and not is_own:
        problem = f"{FLAG} {output}: is there already, an export {difference}."
        raise UserError(problem, "Name a new folder.")
    gone, changed, others = _left(place, known)
    kept = [*(changed if difference else _texts(changed)), *others]
    if kept:
        problem = f"{FLAG} {output}: is there already, with {listed(kept)}, which an export did not write so."
        raise UserError(problem, "Name a new folder, or move what is yours out of this one.")
    output_folder.check_movable(place, output, FLAG)
    if difference:
        return f"{output}: an export {difference} is replaced by this one."
    damaged = _damaged(gone, changed)
    why = f"{listed(damaged)} is not what was written" if damaged else "It was not compared with the model"
    return f"{output}: {why}; it is made again."


def _difference(known: dict[str, Any], made_from: dict[str, Any]) -> str:
    """In words, empty when both are the same export."""
    wanted = json.loads(json.dumps(made_from))
    names = {**PARTS, "type": f"type ({known.get('type')})"}
    parts = {name: what for name, what in names.items() if known.get(name) != wanted[name]}
    if parts and known.get("made_with") != made_with():
        # its version is part of what base and adapter are known by: whether they are others is not known then
        parts = {name: what for name, what in parts.items() if name not in ("of_base", "of_adapter")}
        parts["made_with"] = f"converter ({known.get('made_with')})"
    return f"with another {', another '.join(parts.values())}" if parts else ""


def made_with() -> str:
    """The converter; what it makes of the same files changes with its version."""
    return f"{gguf_check.PACKAGE} {gguf_check.version()}"


def _left(place: Path, known: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Names of what was written there and is gone, of what has changed, and of all that was not written."""
    files = known["files"] if isinstance(known.get("files"), dict) else {}
    there = [name for name in files if (place / name).is_file()]
    changed = [name for name in there if hashing.of_file(place / name) != files[name]]
    others = {path.name for path in place.iterdir()} - {*there, run_folder.EXPORT}
    return [name for name in files if name not in there], changed, sorted(others)


def _texts(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".gguf")]


def _damaged(gone: list[str], changed: list[str]) -> list[str]:
    return [*gone, *(name for name in changed if name.endswith(".gguf"))]
