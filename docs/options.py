"""Print the page docs/options.md: every option of every program, out of the declarations in onecard/config.

.venv/bin/python -m docs.options > docs/options.md
"""

import dataclasses
import importlib
import re
import sys
from collections.abc import Collection
from typing import Any

from onecard.__main__ import PROGRAMS
from onecard.config.declaration import Hub, OnResume, Option, Options, Place, declared
from onecard.config.options import shown_default

HEAD = """# Options

<!-- Written by `docs/options.py`; do not edit this page by hand. -->

Every option of every program, as it is declared in `onecard/config/`. `--help` of a program shows the same
texts, and `--config FILE` takes any of its options from a JSON file.

- **default**: `none` means that the option is not set.
- **role**: a `learned` option changes the result, an `execution` option only how the work is carried out.
- **in the window**: whether the training or chat window shows the option at once, in its folded part or not.
- **when the run goes on**: what may happen to the option when `finetune_continue.py` continues a run in its
  own folder.
- **with other rows**: what may happen to it when `finetune_continue.py` trains the result of a run further on
  other rows, in a new folder.

After a change in `onecard/config/`, write this page again:

```text
.venv/bin/python -m docs.options > docs/options.md
```
"""
WINDOWED = ("finetune", "interaction", "generate")  # programs whose options a window shows
PLACES = {Place.TOP: "at once", Place.COMMON: "at once", Place.FOLDED: "folded", Place.NOWHERE: "no"}


def page() -> str:
    """The whole page as Markdown."""
    return HEAD + "".join(section(command) for command in PROGRAMS)


def section(command: str) -> str:
    """The options of one sub-command; those that another one has too are in the table of that one."""
    settings, (_, purpose) = settings_of(command), PROGRAMS[command]
    others = {other: settings_of(other) for other in PROGRAMS if other != command}
    like = next((other for other, base in others.items() if issubclass(settings, base)), None)
    shared = declared_fields(others[like]) if like else {}
    fields = {name: field for name, field in declared_fields(settings).items() if shared.get(name) != field}
    text = f"\n## {command}\n\nTo {purpose}.\n"
    if like:
        text += f"\nThe options are those of [{like}](#{like}), except for these.\n"
    return text + table(command, settings, fields)


def settings_of(command: str) -> type[Options]:
    """The class of a sub-command's options."""
    return importlib.import_module(f"onecard.programs.{PROGRAMS[command][0]}").SETTINGS


def declared_fields(settings: type[Options]) -> dict[str, tuple[Any, Option]]:
    """Name of each option -> its default and what was declared."""
    fields = settings.__dataclass_fields__
    return {name: (fields[name].default, option) for name, option in declared(settings).items()}


def table(command: str, settings: type[Options], shown: Collection[str]) -> str:
    """The named options, one a line."""
    columns = ["option", "default", "values", "what it is", "role"]
    columns += ["in the window"] if command in WINDOWED else []
    columns += ["when the run goes on", "with other rows"] if command == "finetune" else []
    rows = [cells(field, columns) for field in dataclasses.fields(settings) if field.name in shown]
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells(field: dataclasses.Field[Any], columns: list[str]) -> list[str]:
    """What stands in each column of an option's line."""
    option: Option = field.metadata["option"]
    default = shown_default(field)
    texts = {
        "option": f"`--{field.name}`",
        "default": escaped(default) if default else "empty",
        "values": escaped(values(field, option)),
        "what it is": escaped(
            "; ".join([option.help[0], *(f"it is {use.reason[0]}" for use in option.only)])
        ),
        "role": option.role,
        "in the window": PLACES[option.place] if option.label else "no",
        "when the run goes on": option.resume.value,
        "with other rows": with_other_rows(option).value,
    }
    return [texts[column] for column in columns]


def with_other_rows(option: Option) -> OnResume:
    """What may happen to an option when the result of a run is trained further on other rows."""
    if option.resume in (OnResume.BEGINS, OnResume.NAMES_RUN):
        return option.resume
    if option.fixed_for_other_rows:
        return OnResume.FIXED
    is_compared = option.resume == OnResume.CONTENT and option.hub != Hub.ROWS
    return OnResume.CONTENT if is_compared else OnResume.FREE


def values(field: dataclasses.Field[Any], option: Option) -> str:
    """The choices of an option, its unit, or its kind."""
    if option.choices:
        return ", ".join(map(str, option.choices))
    if option.unit and option.unit[0]:
        return option.unit[0]
    if field.type in (int, float) or option.unit:
        return "a number"
    return "true, false" if field.type is bool else "a text"


def escaped(text: str) -> str:
    """A text in which nothing means anything to Markdown."""
    return re.sub(r"([|*<>\[\]~])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    sys.stdout.write(page())
