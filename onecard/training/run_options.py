"""The options of a run that continues: those with which it began, and those that the user gives now."""

import dataclasses
from collections.abc import Callable
from typing import Any

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.declaration import LEARNED, OnResume, Option, declared
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.data.markers import KEEP
from onecard.errors import CHECKPOINT, UserError
from onecard.runs import folder as runs_folder
from onecard.system import commands


def options_of(stored: dict[str, Any], request: ContinueConfig) -> FinetuneConfig:
    """The run's options. A consent to run code is never read from a file, which may be a stranger's."""
    settings = request.run_settings()
    consents = declaration.names(settings, lambda option: option.never_from_file)
    # runs of earlier versions took no markers off
    values = {runs_folder.MARKED_ROWS: KEEP, **runs_folder.options_of(stored)}
    values |= {name: getattr(request, name) for name in consents}
    return config_options.build(settings, values)


def merged(
    before: FinetuneConfig,
    request: FinetuneConfig,
    explicit: frozenset[str],
    is_fixed: Callable[[Option, Any, Any], bool],
) -> tuple[FinetuneConfig, list[str]]:
    """The run's options with those that the user gave now, and notes of changes that are no other training.

    is_fixed: whether an option cannot change from an old to a new value. Raises UserError (exit 4) naming all
    options that the user gave and that cannot change.
    """
    options = declared(type(before))
    new = {
        name: getattr(request, name)
        for name, option in options.items()
        if name in explicit and option.resume != OnResume.NAMES_RUN
    }
    new = {name: value for name, value in new.items() if value != getattr(before, name)}
    texts = {name: f"{name} {getattr(before, name)} -> {value}" for name, value in new.items()}
    fixed = [
        texts[name] for name, value in new.items() if is_fixed(options[name], getattr(before, name), value)
    ]
    if fixed:
        problem = f"These options cannot change when the run goes on: {'; '.join(fixed)}."
        raise UserError(
            problem, f"Leave them out, or start another run with {commands.name('finetune')}.", CHECKPOINT
        )
    notes = [text for name, text in texts.items() if not _is_learned_by_value(options[name])]
    return dataclasses.replace(before, **new), notes


def _is_learned_by_value(option: Option) -> bool:
    """Whether another value is another training; of some options only the content counts."""
    return option.role == LEARNED and option.resume != OnResume.CONTENT


def fixed_in_same_run(option: Option, old: Any, new: Any) -> bool:
    """Whether an option cannot change from `old` to `new` when a run continues in its own folder."""
    if option.resume == OnResume.LARGER:
        return new is None or (old is not None and new < old)
    return option.resume == OnResume.FIXED or (option.resume == OnResume.BEGINS and bool(new))


def fixed_with_other_rows(option: Option, old: Any, new: Any) -> bool:
    """Whether an option cannot change when a run continues on other rows in a new folder."""
    return option.fixed_for_other_rows


def is_longer(options: FinetuneConfig, before: dict[str, Any]) -> bool:
    """Whether these options make a run longer than the stored ones did."""
    larger = declaration.names(type(options), lambda option: option.resume == OnResume.LARGER)
    return any(getattr(options, name) != before.get(name) for name in larger)
