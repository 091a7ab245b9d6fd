"""Declared options -> command lines, JSON files, checked settings. This file knows no option by name.

onecard/config/declaration.py says what an option is.
"""

import argparse
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from onecard.config.declaration import Option, Options, Text, Use, declared, without_effect
from onecard.errors import UserError

SUBCOMMAND = "onecard "  # how the name of a program begins that is called as a sub-command
SCRIPT = re.compile(r"python \S+\.py")  # the program of an example, as it is called in a checkout

Settings = TypeVar("Settings", bound=Options)


def parse(settings: type[Settings], argv: Sequence[str] | None = None, description: str = "") -> Settings:
    """Command line (and `--config FILE`, which flags override) -> settings; all mistakes in one UserError."""
    return parse_given(settings, argv, description)[0]


def parse_given(
    settings: type[Settings], argv: Sequence[str] | None = None, description: str = ""
) -> tuple[Settings, frozenset[str]]:
    """Like parse, and the names of the options that the user set, by a flag or in the file."""
    parser = _Parser(allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.description = as_called(description, parser.prog)
    parser.add_argument(
        "--config", metavar="FILE", help="JSON file with any of these options; flags override it"
    )
    for field in dataclasses.fields(settings):
        _add_flag(parser, field)
    namespace, unknown = parser.parse_known_args(argv)
    flags = vars(namespace)
    file = flags.pop("config")
    stored = _read_json(file) if file else {}
    for name, option in declared(settings).items():
        if option.never_from_file and stored.get(name) is not None:
            problem = f"--config {file}: {name} cannot be set in a file."
            raise UserError(problem, f"Give {flag(settings, name)} on the command line.")
    values = {**stored, **flags}
    return build(settings, values, source=file, unknown=unknown), frozenset(values)


def build(
    settings: type[Settings], values: dict[str, Any], source: str | None = None, unknown: Sequence[str] = ()
) -> Settings:
    """Raw values (texts or JSON values) -> checked settings; raises one UserError naming every bad one."""
    options = declared(settings)
    hints = typing.get_type_hints(settings)
    mistakes = [
        f"{source or 'options'}: no option is called {name!r}" for name in values if name not in options
    ]
    if unknown:
        mistakes.insert(0, f"unrecognized arguments: {' '.join(unknown)}")
    checked = {}
    for name, value in values.items():
        if name in options:
            try:
                checked[name] = _checked(value, hints[name], options[name])
            except ValueError as error:
                mistakes.append(f"--{name} {value}: {error}")
    if mistakes:
        raise UserError("; ".join(mistakes) + ".", "See --help.")
    return settings(**checked)


def set_without_effect(options: Any, absent: Collection[Use]) -> dict[str, Text]:
    """Option -> why it has no effect where these uses do not apply, of options that ask for something."""
    settings = type(options)
    plain, facts = settings(), declared(settings)
    return {
        name: reason
        for name, reason in without_effect(settings, absent).items()
        if getattr(options, name) not in (getattr(plain, name), *facts[name].idle_values)
    }


def refuse_unused(options: Any, *absent: Use) -> None:
    """Raise UserError naming all options that ask for something and have no effect without these uses."""
    idle = set_without_effect(options, absent)
    if idle:
        raise UserError(
            "; ".join(f"--{name} is {reason[0]}" for name, reason in idle.items()) + ".", "Leave it out."
        )


def flag(settings: Options | type[Options], name: str) -> str:
    """How a message names an option of these settings; a name that they lack is a fault of the program."""
    assert name in settings.__dataclass_fields__, name
    return f"--{name}"


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Values of options as what a child process parses: `--bits=4`, `--overwrite=true`."""
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def _checked(value: Any, hint: Any, option: Option) -> Any:
    value = _converted(value, hint)
    if value is None:
        return None
    if option.choices and value not in option.choices:
        raise ValueError("choose from " + ", ".join(map(str, option.choices)))
    problem = option.check(value) if option.check else None
    if problem:
        raise ValueError(problem)
    return value


def _converted(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds:
        return _boolean(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("must be a number" if float in kinds or int in kinds else "must be a text")
    if str in kinds and (int not in kinds or value == "auto"):
        return str(value)
    if int in kinds and str(value).strip().lstrip("+-").isdecimal():
        return int(value)  # not by way of float, which holds 53 bits
    number = _number(value)
    if int in kinds:
        if number != int(number):
            raise ValueError("must be a whole number" + (" or auto" if str in kinds else ""))
        return int(number)
    return number


def _number(value: str | int | float) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError("must be a number") from None
    except OverflowError:
        raise ValueError("must be a finite number") from None
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def _boolean(value: Any) -> bool:
    words = {
        "true": True,
        "yes": True,
        "1": True,
        "on": True,
        "false": False,
        "no": False,
        "0": False,
        "off": False,
    }
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError("must be true or false")
    return words[str(value).lower()]


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.", "Name a JSON file of options.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not JSON ({error}).", 'It should look like {"bits": 4}.') from None
    if not isinstance(values, dict):
        raise UserError(
            f"--config {path}: the file does not hold a JSON object.", 'It should look like {"bits": 4}.'
        )
    return values


def shown_default(field: dataclasses.Field[Any]) -> str:
    """The default of an option as a user would type it."""
    if field.default is None:
        return "none"
    return str(field.default).lower() if field.type is bool else str(field.default)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    option: Option = field.metadata["option"]
    text = f"{option.help[0]} [{shown_default(field)}; {option.role}]".replace("%", "%%")
    is_switch = field.type is bool  # its value may be left out
    parser.add_argument(
        f"--{field.name}",
        nargs="?" if is_switch else None,
        const="true" if is_switch else None,
        metavar="|".join(map(str, option.choices)) or ("true|false" if is_switch else field.name.upper()),
        default=argparse.SUPPRESS,
        help=text,
    )
    if option.positional:
        parser.add_argument(
            field.name,
            nargs="?",
            metavar=field.name.upper(),
            default=argparse.SUPPRESS,
            help=f"the same as --{field.name}",
        )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The description keeps its lines: below what a program does stand commands, one a line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def as_called(description: str, program: str) -> str:
    """A program's description with its example commands as the program was called: `onecard merge`, say."""
    called = program.startswith(SUBCOMMAND)
    return SCRIPT.sub(lambda match: program if called else match[0], description)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(f"{message}.", f"See {self.prog} --help.")
