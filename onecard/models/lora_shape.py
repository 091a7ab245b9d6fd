"""The settings of an adapter: rank, alpha, dropout, target modules, and further settings of peft."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from peft.utils.constants import DUMMY_TARGET_MODULES as NO_TARGETS

from onecard.config.training import FinetuneConfig
from onecard.errors import UserError

# the settings of peft's LoraConfig that --peft_config may hold: with any of them, a checkpoint stays an
# adapter that other tools can load
EXTRAS = {
    "alpha_pattern": dict,
    "exclude_modules": list,
    "init_lora_weights": (bool, str),
    "layers_pattern": str,
    "layers_to_transform": list,
    "rank_pattern": dict,
    "use_dora": bool,
    "use_rslora": bool,
}
ALL_LINEAR = "all-linear"  # as target modules: every linear layer but the head
LORA, EMBEDDINGS, BOTH = "lora", "embeddings", "lora+embeddings"  # the kinds of adapters
# values of init_lora_weights; the others change the base's weights or need rows
STARTS = (True, "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class LoraShape:
    """The settings of an adapter: rank, alpha, dropout, names of its target modules, and further settings.

    what: "lora" trains low-rank pairs; "embeddings" trains only the input embedding, as a whole;
    "lora+embeddings" trains the low-rank pairs, the input embedding and the head.
    """

    r: int
    alpha: float
    dropout: float
    target_modules: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # further settings of LoraConfig
    what: str = LORA

    @classmethod
    def of(cls, options: FinetuneConfig) -> "LoraShape":
        """The shape that the options describe. It reads the file of --peft_config.

        Raises UserError as read_extras does.
        """
        return cls(
            options.lora_r,
            options.lora_alpha,
            options.lora_dropout,
            options.lora_target_modules,
            read_extras(options.peft_config, options.rslora),
            options.train_what,
        )

    def targets(self) -> str | list[str]:
        """The target modules as peft takes them: a list of names, or one of peft's keywords."""
        if self.what == EMBEDDINGS:
            return NO_TARGETS  # no module gets a low-rank pair
        names = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        return ALL_LINEAR if names == [ALL_LINEAR] else names


def read_extras(path: str | None, rslora: bool) -> dict[str, Any]:
    """The further settings that --peft_config (a path to a JSON file) and --rslora give.

    Raises UserError that names the setting that is wrong.
    """
    extras: dict[str, Any] = {}
    if path:

        def wrong(problem: str) -> UserError:
            return UserError(f"--peft_config {path}: {problem}.", f"It may hold: {', '.join(EXTRAS)}.")

        try:
            extras = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise wrong(f"the file cannot be read ({error})") from None
        if not isinstance(extras, dict):
            raise wrong("the file does not hold a JSON object")
        for name, value in extras.items():
            if name not in EXTRAS:
                raise wrong(f"{name!r} belongs to another kind of adapter, or has an option of its own")
            if not isinstance(value, EXTRAS[name]):
                raise wrong(f"{name!r} cannot be {value!r}")
        if extras.get("init_lora_weights", True) not in STARTS:
            raise wrong(f"'init_lora_weights' can be {', '.join(map(str, STARTS))}")
    if rslora:
        extras["use_rslora"] = True
    return extras
