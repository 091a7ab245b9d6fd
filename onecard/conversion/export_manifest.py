"""What an earlier export left in a folder, and whether a new export may replace it.

Only files that OneCard wrote and nobody changed are replaced: by the same export, or inside the folder of a
run by a later export of that run. Nothing here writes files.
"""

import json
from pathlib import Path
from typing import Any

from onecard.errors import CHECKPOINT, UserError, listed
from onecard.inference import gguf_check
from onecard.runs import folder as runs_folder
from onecard.system import files as system_files
from onecard.system import hashing, output_folder

FLAG = "--output_path"
PARTS = {  # keys of export.json in which two exports may differ -> words for them
    "of_base": "base model",
    "of_adapter": "adapter",
    "template": "template",
    "ends": "set of end tokens",
}


def find(output: Path) -> dict[str, Any] | None:
    """The values in export.json of an export in this folder, None where nothing is.

    Raises UserError when something else is in the folder, or when no folder can be made there.
    """
    place = output_folder.find(output, FLAG)
    try:
        values = system_files.read_json(place / runs_folder.EXPORT) if place.is_dir() else None
    except UserError:
        problem = f"{FLAG} {output}: the folder exists already, and its {runs_folder.EXPORT} is damaged."
        raise UserError(problem, "Name a new folder, or delete this one.", CHECKPOINT) from None
    if isinstance(values, dict):
        return values
    output_folder.check_free(place, output, FLAG)
    return None


def is_done(place: Path, record: dict[str, Any], made_from: dict[str, Any], check: bool) -> bool:
    """Whether the same export is there, undamaged, and compared with the model if `check` is set."""
    if _difference(record, made_from) or (check and not record.get("check")):
        return False
    return not _damaged(*_left(place, record)[:2])


def edited(place: Path, record: dict[str, Any]) -> list[str]:
    """The text files that were changed since the export; a changed file of weights counts as damaged."""
    return _texts(_left(place, record)[1])


def replaced(output: Path, record: dict[str, Any], made_from: dict[str, Any], is_own: bool) -> str:
    """Why the export there is made again, as a sentence; raises UserError (exit 2) when it has to stay.

    is_own: whether the folder lies in the folder of the adapter, under the usual name.
    """
    place, difference = output_folder.find(output, FLAG), _difference(record, made_from)
    if difference and not is_own:
        problem = f"{FLAG} {output}: there is an export {difference} already."
        raise UserError(problem, "Name a new folder.")
    gone, changed, others = _left(place, record)
    edits = [*(changed if difference else _texts(changed)), *others]
    if edits:
        problem = (
            f"{FLAG} {output}: there is an export already, with files added or changed: {listed(edits)}."
        )
        raise UserError(problem, "Name a new folder, or move your own files out of this one.")
    output_folder.check_movable(place, output, FLAG)
    if difference:
        return f"{output}: an export {difference} is replaced by this one."
    damaged = _damaged(gone, changed)
    why = f"{listed(damaged)} is not as it was written" if damaged else "It was not compared with the model"
    return f"{output}: {why}; it is made again."


def _difference(record: dict[str, Any], made_from: dict[str, Any]) -> str:
    """How the two exports differ, in words; "" when they are the same."""
    current = json.loads(json.dumps(made_from))
    names = {**PARTS, "type": f"type ({record.get('type')})"}
    parts = {name: what for name, what in names.items() if record.get(name) != current[name]}
    if parts and record.get("made_with") != made_with():
        # the keys of base and adapter contain the converter's version, so they say nothing across versions
        parts = {name: what for name, what in parts.items() if name not in ("of_base", "of_adapter")}
        parts["made_with"] = f"converter ({record.get('made_with')})"
    return f"with another {', another '.join(parts.values())}" if parts else ""


def made_with() -> str:
    """The converter and its version, with which its output may change."""
    return f"{gguf_check.PACKAGE} {gguf_check.version()}"


def _left(place: Path, record: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Names of files that were written and are gone, that have changed, and that were not written by it."""
    files = record["files"] if isinstance(record.get("files"), dict) else {}
    there = [name for name in files if (place / name).is_file()]
    changed = [name for name in there if hashing.of_file(place / name) != files[name]]
    others = {path.name for path in place.iterdir()} - {*there, runs_folder.EXPORT}
    return [name for name in files if name not in there], changed, sorted(others)


def _texts(names: list[str]) -> list[str]:
    return [name for name in names if not name.endswith(".gguf")]


def _damaged(gone: list[str], changed: list[str]) -> list[str]:
    return [*gone, *(name for name in changed if name.endswith(".gguf"))]
