"""The hub's names that a run has recorded -> folders on this machine, at the commits that it began with.

Nobody typed them in the command that continues it, so the hub is not asked for them.
"""

from collections.abc import Callable
from typing import Any

from onecard.errors import UserError
from onecard.hub import revisions
from onecard.hub.manifest import DEMO
from onecard.system.console import say

OPTIONS = MODEL_PATH, *DATA = ("model_path", "data_path", "eval_data_path")
UNASKED = "Nothing is fetched unasked."
Fetch = Callable[[str], str]


def base_of(stored: dict[str, Any], typed: dict[str, str | None], locate: Fetch) -> Fetch:
    """locate for the run's base; typed: those of OPTIONS that the user gave, stored: finetune_config.json."""

    def found(name: str) -> str:
        if MODEL_PATH in typed and revisions.split(name)[1]:
            return locate(name)
        version = revisions.recorded(name, stored["resolved"].get("base"), stored=MODEL_PATH not in typed)
        if name == DEMO or not revisions.is_name(version):
            return locate(version)
        here = revisions.of_record(version, say)
        if here or MODEL_PATH in typed:
            return here or locate(version)
        problem = f"The run's base {version} is not on this machine."
        raise UserError(problem, f"To fetch it: --model_path {name}. {UNASKED}")

    return found


def rows_of(stored: dict[str, Any], typed: dict[str, str | None], fetch: Fetch) -> Fetch:
    """fetch for the run's datasets; those that were typed follow their names."""
    asked = [part.strip() for option in DATA for part in (typed.get(option) or "").split(",")]
    noted = (stored.get("data") or {}).get("versions") or []

    def found(name: str) -> str:
        if any(part == name or part.startswith(f"{name}:") for part in asked):  # with a weight
            return fetch(name)
        known = [
            text for text in (revisions.recorded(name, text, stored=True) for text in noted) if text != name
        ]
        here = revisions.of_record(known[0] if known else name, say, revisions.DATASET)
        if here:
            return here
        problem = f"The run's rows {known[0] if known else name} are not on this machine."
        raise UserError(problem, f"To fetch them: --data_path {name}. {UNASKED}")

    return found
