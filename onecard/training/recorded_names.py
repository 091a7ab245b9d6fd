"""Finds the folders that a run's names on the hub mean, at the commits that the run began with.

The user typed the names of a new run, so they may be downloaded. The names that a run has recorded were not
typed in the command that continues it, so they are looked for on this machine only.
"""

import dataclasses
from typing import Any

from onecard.config.declaration import Hub, declared
from onecard.config.training import FinetuneConfig
from onecard.errors import UserError
from onecard.hub import locate, revisions
from onecard.hub.demo import DEMO

UNASKED = "A recorded name alone is never downloaded."


@dataclasses.dataclass(frozen=True)
class Names:
    """The folders that names on the hub mean in one run.

    stored: finetune_config.json of the run that continues, None for a new run; typed: what the user gave in
    the command that continues it, as `typed` returns it.
    """

    stored: dict[str, Any] | None = None
    typed: dict[Hub, list[str]] = dataclasses.field(default_factory=dict)

    def base(self, name: str) -> str:
        """Folder of the base model. Raises UserError when a recorded one is not on this machine."""
        is_typed = bool(self.typed.get(Hub.BASE))
        if self.stored is None or (is_typed and revisions.split(name)[1]):
            return locate.locate(name)
        version = revisions.recorded(name, self.stored["resolved"].get("base"), stored=not is_typed)
        if name == DEMO or not revisions.is_name(version):
            return locate.locate(version)
        folder = revisions.at_hand(version)
        if folder:
            revisions.say_commit(folder)
            return str(folder)
        if is_typed:
            return locate.locate(version)
        problem = f"The run's base {version} is not on this machine."
        raise UserError(problem, f"To download it, add --model_path {name}. {UNASKED}")

    def rows(self, name: str) -> str:
        """Folder of a dataset. Raises UserError when a recorded one is not on this machine."""
        parts = [part.strip() for text in self.typed.get(Hub.ROWS, []) for part in text.split(",")]
        is_typed = any(part == name or part.startswith(f"{name}:") for part in parts)  # with a weight
        if self.stored is None or is_typed:
            return locate.fetch_dataset(name)
        recorded = (self.stored.get("data") or {}).get("versions") or []
        versions = [revisions.recorded(name, text, stored=True) for text in recorded]
        version = next((text for text in versions if text != name), name)
        folder = revisions.at_hand(version, revisions.DATASET)
        if folder:
            revisions.say_commit(folder)
            return str(folder)
        problem = f"The run's rows {version} are not on this machine."
        raise UserError(problem, f"To download them, add --data_path {name}. {UNASKED}")


NEW_NAMES = Names()  # of a new run


def typed(options: FinetuneConfig, explicit: frozenset[str]) -> dict[Hub, list[str]]:
    """What the user gave for options that may name something on the hub.

    explicit: names of the options that the user set.
    """
    texts: dict[Hub, list[str]] = {}
    for name, option in declared(type(options)).items():
        if option.hub and name in explicit:
            texts.setdefault(option.hub, []).append(getattr(options, name) or "")
    return texts
