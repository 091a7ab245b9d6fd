"""The hub's names that a run uses -> folders on this machine, at the commits that the run began with.

The names of a new run were typed by the user, so the hub is asked for them. Nobody typed those that a run has
recorded in the command that continues it, so they are looked for on this machine alone.
"""

import dataclasses
from typing import Any

from onecard.errors import UserError
from onecard.hub import locate, revisions
from onecard.hub.manifest import DEMO

OPTIONS = MODEL_PATH, *DATA = ("model_path", "data_path", "eval_data_path")
UNASKED = "Nothing is fetched unasked."


@dataclasses.dataclass(frozen=True)
class Names:
    """What names of the hub mean in one run.

    stored: finetune_config.json of the run that goes on, None for a new one; typed: those of OPTIONS that the
    user gave in the command that continues it.
    """

    stored: dict[str, Any] | None = None
    typed: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def base(self, name: str) -> str:
        """Folder of the base model; raises UserError when a recorded one is not on this machine."""
        if self.stored is None or (MODEL_PATH in self.typed and revisions.split(name)[1]):
            return locate.locate(name)
        is_typed = MODEL_PATH in self.typed
        version = revisions.recorded(name, self.stored["resolved"].get("base"), stored=not is_typed)
        if name == DEMO or not revisions.is_name(version):
            return locate.locate(version)
        here = revisions.of_record(version)
        if here or is_typed:
            return here or locate.locate(version)
        problem = f"The run's base {version} is not on this machine."
        raise UserError(problem, f"To fetch it: --model_path {name}. {UNASKED}")

    def rows(self, name: str) -> str:
        """Folder of a dataset; raises UserError when a recorded one is not on this machine."""
        asked = [part.strip() for option in DATA for part in (self.typed.get(option) or "").split(",")]
        is_typed = any(part == name or part.startswith(f"{name}:") for part in asked)  # with a weight
        if self.stored is None or is_typed:
            return locate.fetch_dataset(name)
        noted = (self.stored.get("data") or {}).get("versions") or []
        versions = [revisions.recorded(name, text, stored=True) for text in noted]
        version = next((text for text in versions if text != name), name)
        here = revisions.of_record(version, revisions.DATASET)
        if here:
            return here
        problem = f"The run's rows {version} are not on this machine."
        raise UserError(problem, f"To fetch them: --data_path {name}. {UNASKED}")


NEW_NAMES = Names()  # of a run that begins
