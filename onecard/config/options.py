"""Declared options -> command lines, JSON files, checked settings. Knows no option by name.

An option is a dataclass field made by `option`: its default, role, help with the unit, and what it may be.
"""

import argparse
import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from onecard.errors import UserError

LEARNED, EXECUTION = "learned", "execution"
RUNS_CODE = (
    "run the Python code that came with the base model, with your rights, at this full commit; "
    "none: such a model is refused"
)
SUBCOMMAND = "onecard "  # how the name of a program begins that is called as a sub-command
SCRIPT = re.compile(r"python \S+\.py")  # the program of an example, as it is called in a checkout
COMMIT = re.compile(r"[0-9a-f]{40}")  # of git, whole


class Options(typing.Protocol):
    """Any dataclass whose fields are options."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]


Settings = TypeVar("Settings", bound=Options)
Check = Callable[[Any], str | None]  # a value -> what is wrong with it, or None


def option(
    default: Any,
    role: str,
    text: str | tuple[str, str],
    choices: Sequence[Any] = (),
    check: Check | None = None,
    label: tuple[str, str] | None = None,
    slider: tuple[float, float, float] | None = None,
    positional: bool = False,
    typed: bool = False,
) -> Any:
    """One option: its default, role, help with the unit, the values it may take.

    text: the help, of an option that windows show English and Chinese; label: its name there, in both;
    slider: there from, to, step; positional: its value may stand on the command line without the flag; typed:
    only there, as a file of options may be a stranger's.
    """
    english, chinese = (text, "") if isinstance(text, str) else text
    metadata = {
        "role": role,
        "help": english,
        "chinese": chinese,
        "choices": tuple(choices),
        "check": check,
        "label": label,
        "slider": slider,
        "positional": positional,
        "typed": typed,
    }
    return dataclasses.field(default=default, metadata=metadata)


def inherited(settings: type, name: str, default: Any = dataclasses.MISSING) -> Any:
    """The option of other settings once more; its default may differ."""
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    value = field.default if default is dataclasses.MISSING else default
    return dataclasses.field(default=value, metadata=field.metadata)


def at_least(low: float) -> Check:
    return lambda value: None if value >= low else f"must be {low} or more"


def between(low: float, high: float) -> Check:
    return lambda value: None if low <= value <= high else f"must be from {low} to {high}"


def above(low: float) -> Check:
    return lambda value: None if value > low else f"must be above {low}"


def fraction(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be 0 or more and below 1"


def auto_or_at_least(low: int) -> Check:
    return lambda value: None if value == "auto" or value >= low else f"must be auto, or {low} or more"


def rows_or_fraction(value: float) -> str | None:
    if value < 0 or (value >= 1 and value != int(value)):
        return "must be a fraction below 1 or a whole number of rows"
    return None


def memory_of_cards(text: str | None) -> dict[int | str, str] | None:
    """{0: "10GiB", "cpu": "20GiB"} of "0:10GiB,cpu:20GiB"; raises ValueError for anything else."""
    if not text:
        return None
    found: dict[int | str, str] = {}
    for part in text.split(","):
        card, _, size = part.strip().partition(":")
        if not (card.isdecimal() or card == "cpu") or not re.fullmatch(r"\d+(\.\d+)?(GiB|MiB|GB|MB)", size):
            raise ValueError(f"{part!r} is not CARD:SIZE, such as 0:10GiB")
        found[int(card) if card.isdecimal() else card] = size
    return found


def card_memory(text: str) -> str | None:
    try:
        memory_of_cards(text)
    except ValueError as error:
        return str(error)
    return None


def login(text: str) -> str | None:
    user, colon, password = text.partition(":")
    return None if user and colon and password else "must be user:password"


def full_commit(value: str) -> str | None:
    problem = "must be a full commit: 40 characters 0-9 and a-f, no branch, no tag"
    return None if COMMIT.fullmatch(value) else problem


def commit_option(text: str) -> Any:
    """Consent to a model's own code by its full commit, which nobody but the user may give."""
    return option(None, EXECUTION, text, check=full_commit, typed=True)


def parse(settings: type[Settings], argv: Sequence[str] | None = None, description: str = "") -> Settings:
    """Command line (and `--config FILE`, which flags override) -> settings; all mistakes in one UserError."""
    return parse_given(settings, argv, description)[0]


def parse_given(
    settings: type[Settings], argv: Sequence[str] | None = None, description: str = ""
) -> tuple[Settings, frozenset[str]]:
    """Like parse, and the names of the options that were given, by a flag or in the file."""
    parser = _Parser(allow_abbrev=False, formatter_class=_HelpFormatter)
    parser.description = as_called(description, parser.prog)
    parser.add_argument(
        "--config", metavar="FILE", help="JSON file with any of these options; flags override it"
    )
    for field in dataclasses.fields(settings):
        _add_flag(parser, field)
    known, unknown = parser.parse_known_args(argv)
    flags = vars(known)
    file = flags.pop("config")
    stored = _read_json(file) if file else {}
    for field in dataclasses.fields(settings):
        if field.metadata["typed"] and stored.get(field.name) is not None:
            problem = f"--config {file}: {field.name} is not taken from a file."
            raise UserError(problem, f"Give --{field.name} on the command line.")
    values = {**stored, **flags}
    return build(settings, values, source=file, unknown=unknown), frozenset(values)


def build(
    settings: type[Settings], values: dict[str, Any], source: str | None = None, unknown: Sequence[str] = ()
) -> Settings:
    """Raw values (texts or JSON values) -> checked settings; raises one UserError naming every bad one."""
    fields = {field.name: field for field in dataclasses.fields(settings)}
    hints = typing.get_type_hints(settings)
    mistakes = [
        f"{source or 'options'}: no option is called {name!r}" for name in values if name not in fields
    ]
    if unknown:
        mistakes.insert(0, f"unrecognized arguments: {' '.join(unknown)}")
    checked = {}
    for name, value in values.items():
        if name in fields:
            try:
                checked[name] = _checked(value, hints[name], fields[name].metadata)
            except ValueError as error:
                mistakes.append(f"--{name} {value}: {error}")
    if mistakes:
        raise UserError("; ".join(mistakes) + ".", "See --help.")
    return settings(**checked)


def refuse_idle(options: Any, idle: Mapping[str, str]) -> None:
    """Raise UserError naming all options in `idle` (name -> what it is for) that are not at their default."""
    plain = type(options)()
    given = [name for name in idle if getattr(options, name) != getattr(plain, name)]
    if given:
        raise UserError("; ".join(f"--{name} is {idle[name]}" for name in given) + ".", "Leave it out.")


def flag(settings: Options | type[Options], name: str) -> str:
    """How a message names an option of these settings; a name that they lack is a fault of the program."""
    assert name in settings.__dataclass_fields__, name
    return f"--{name}"


def command_line(values: Mapping[str, Any]) -> list[str]:
    """Values of options as what a child process parses: `--bits=4`, `--overwrite=true`."""
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def roles(settings: type) -> dict[str, str]:
    """Option name -> `learned` or `execution`."""
    return {field.name: field.metadata["role"] for field in dataclasses.fields(settings)}


def _checked(value: Any, hint: Any, metadata: Any) -> Any:
    value = _converted(value, hint)
    if value is None:
        return None
    if metadata["choices"] and value not in metadata["choices"]:
        raise ValueError("choose from " + ", ".join(map(str, metadata["choices"])))
    problem = metadata["check"](value) if metadata["check"] else None
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
    except ValueError as error:
        raise UserError(f"--config {path}: not JSON ({error}).", 'It should look like {"bits": 4}.') from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no JSON object.", 'It should look like {"bits": 4}.')
    return values


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    default = (
        "none"
        if field.default is None
        else str(field.default).lower()
        if field.type is bool
        else field.default
    )
    text = f"{field.metadata['help']} [{default}; {field.metadata['role']}]".replace("%", "%%")
    choices = "|".join(map(str, field.metadata["choices"]))
    is_switch = field.type is bool  # its value may be left out
    parser.add_argument(
        f"--{field.name}",
        nargs="?" if is_switch else None,
        const="true" if is_switch else None,
        metavar=choices or ("true|false" if is_switch else field.name.upper()),
        default=argparse.SUPPRESS,
        help=text,
    )
    if field.metadata["positional"]:
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
