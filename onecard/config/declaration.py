"""How an option is declared: one call that says everything that depends on the option.

An option is a field of a settings dataclass, made by one of `option`, `window_option`, `learned`, `execution`
and `inherited`. Who needs to know which options are paths, say, asks `names`: options are listed by name
nowhere else.
"""

import dataclasses
import enum
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any

from onecard.config.checks import Check, full_commit

LEARNED, EXECUTION = "learned", "execution"  # roles
Text = tuple[str, str]  # English, Chinese

# units: the help of an option with a unit names it in both languages
TOKENS, ROWS, STEPS, EPOCHS = ("tokens", "词元"), ("rows", "行"), ("steps", "步"), ("epochs", "轮")
BITS, THREADS, TURNS, ANSWERS = ("bits", "位"), ("threads", "线程"), ("turns", "轮"), ("answers", "回答")
NO_UNIT = ("", "")  # a plain number, such as a seed or a ratio


class Options(typing.Protocol):
    """Any dataclass whose fields are options."""

    __dataclass_fields__: typing.ClassVar[dict[str, dataclasses.Field[Any]]]


class Place(enum.Enum):
    """Where a window shows an option."""

    TOP = enum.auto()  # above all others, laid out by hand
    COMMON = enum.auto()  # shown at once
    FOLDED = enum.auto()  # in a part that is folded at first
    NOWHERE = enum.auto()


class OnResume(enum.Enum):
    """What may happen to an option when a run goes on in its own folder; the value is how the docs say it."""

    FIXED = "stays as it was"
    LARGER = "can be made larger"
    FREE = "can change"
    CONTENT = "can have another name, with the same content"
    NAMES_RUN = "names the run"  # and is not compared: the folder may have moved
    BEGINS = "only begins a run"


class Hub(enum.Enum):
    """What an option names that may come from the hub; a run records its commit."""

    BASE = enum.auto()
    ROWS = enum.auto()


@dataclasses.dataclass(frozen=True)
class Use:
    """What an option is for. `reason` completes "--option is ..." where the option has no effect."""

    reason: Text


class Details(typing.TypedDict, total=False):
    """The keywords of every function that declares an option. `Option` says what they mean."""

    unit: Text
    choices: tuple[Any, ...]
    check: Check
    positional: bool
    never_from_file: bool
    place: Place
    slider: tuple[float, float, float]
    window_value: Any
    is_path: bool
    is_written: bool
    hub: Hub
    content: str
    only: tuple[Use, ...]
    idle_values: tuple[Any, ...]
    decides_memory: bool
    saves_memory: bool
    on_resume: OnResume
    recorded: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Option:
    """Everything that depends on an option, apart from its name, type and default."""

    role: str  # LEARNED: it changes the result; EXECUTION: only how the work is carried out
    help: Text  # with the unit; the Chinese one is "" where no window shows the option
    label: Text | None = None  # its name in a window
    unit: Text | None = None  # of a number
    choices: tuple[Any, ...] = ()
    check: Check | None = None
    positional: bool = False  # its value may stand on the command line without the flag
    never_from_file: bool = False  # only the command line may give it: a file of options may be a stranger's

    place: Place = Place.FOLDED
    slider: tuple[float, float, float] | None = None  # from, to, step
    window_value: Any = None  # with which a window begins instead of the default

    is_path: bool = False  # it may name a file or folder that is read; a window checks where that lies
    is_written: bool = False  # it names a file that is written
    hub: Hub | None = None
    content: str = ""  # fingerprint of the run in which the content of what it names counts

    only: tuple[Use, ...] = ()  # it has an effect only where all of these apply
    idle_values: tuple[Any, ...] = ()  # values besides the default that ask for nothing
    decides_memory: bool = False  # the memory that a training takes depends on it
    saves_memory: bool = False  # a smaller value needs less memory

    changes_rows: bool | None = None  # encoded rows depend on its value, which is part of their cache key
    fixed_for_other_rows: bool = False  # it stays when a run goes on with other rows in a new folder
    on_resume: OnResume | None = None
    recorded: tuple[str, ...] = ()  # methods whose output folder records it: another value, another folder

    @property
    def resume(self) -> OnResume:
        """What may happen to it when a run goes on: what is learned stays, unless declared otherwise."""
        return self.on_resume or (OnResume.FIXED if self.role == LEARNED else OnResume.FREE)


def option(default: Any, role: str, help: str, **details: typing.Unpack[Details]) -> Any:
    """An option of the command line alone."""
    return _field(default, Option(role, (help, ""), **details))


def window_option(default: Any, role: str, label: Text, help: Text, **details: typing.Unpack[Details]) -> Any:
    """An option that a window shows too: label and help in both languages."""
    return _field(default, Option(role, help, label, **details))


def learned(
    default: Any,
    label: Text,
    help: Text,
    *,
    changes_rows: bool,
    fixed_for_other_rows: bool,
    **details: typing.Unpack[Details],
) -> Any:
    """An option of training that changes the adapter.

    changes_rows: encoded rows depend on its value; without it stale token ids would be taken from the cache.
    fixed_for_other_rows: adapter, optimizer or schedule depend on it.
    """
    option = Option(LEARNED, help, label, **details)
    rules = dataclasses.replace(option, changes_rows=changes_rows, fixed_for_other_rows=fixed_for_other_rows)
    return _field(default, rules)


def execution(default: Any, label: Text, help: Text, **details: typing.Unpack[Details]) -> Any:
    """An option of training that changes only how the work is carried out."""
    return _field(default, Option(EXECUTION, help, label, **details))


def commit_option(label: Text | None, help: Text, **details: typing.Unpack[Details]) -> Any:
    """Consent to a model's own code by its full commit, which nobody but the user may give."""
    option = Option(EXECUTION, help, label, **details)
    return _field(None, dataclasses.replace(option, check=full_commit, never_from_file=True))


def inherited(
    settings: type[Options],
    name: str,
    default: Any = dataclasses.MISSING,
    **details: typing.Unpack[Details],
) -> Any:
    """The option of other settings once more; its default and details may differ."""
    field = settings.__dataclass_fields__[name]
    value = field.default if default is dataclasses.MISSING else default
    return _field(value, dataclasses.replace(field.metadata["option"], **details))


def _field(default: Any, option: Option) -> Any:
    return dataclasses.field(default=default, metadata={"option": option})


def declared(settings: type[Options]) -> dict[str, Option]:
    """Name of each option -> what was declared, in the order of declaration."""
    fields = settings.__dataclass_fields__
    return {name: field.metadata["option"] for name, field in fields.items()}


def names(settings: type[Options], condition: Callable[[Option], bool]) -> list[str]:
    """The options of which something is true, in the order of declaration."""
    return [name for name, option in declared(settings).items() if condition(option)]


def without_effect(settings: type[Options], absent: Collection[Use]) -> dict[str, Text]:
    """Option -> why it has no effect where these uses do not apply."""
    reasons = {
        name: [use.reason for use in option.only if use in absent]
        for name, option in declared(settings).items()
    }
    return {name: texts[0] for name, texts in reasons.items() if texts}


def row_options(settings: type[Options]) -> list[str]:
    """The options on whose values encoded rows depend."""
    undecided = names(settings, lambda option: option.role == LEARNED and option.changes_rows is None)
    assert not undecided, f"say whether {undecided} change encoded rows"
    return names(settings, lambda option: option.changes_rows is True)


def memory_savers(
    settings: type[Options], absent: Collection[Use] = (), rules: Collection[OnResume] = tuple(OnResume)
) -> str:
    """The flags that need less memory with a smaller value, as a message names them; "" without any.

    absent: uses that do not apply in the program; rules: of resuming, those that let a user change it.
    """
    idle = without_effect(settings, absent)
    savers = names(settings, lambda option: option.saves_memory and option.resume in rules)
    options = declared(settings)
    savers.sort(key=lambda name: options[name].role == LEARNED)  # first those that do not change the result
    return flags([name for name in savers if name not in idle])


def flags(option_names: Sequence[str]) -> str:
    """Options as a message names them: `--a, --b or --c`; "" without any."""
    texts = [f"--{name}" for name in option_names]
    return " or ".join(filter(None, [", ".join(texts[:-1]), *texts[-1:]]))


def recorded(options: Options, method: str) -> dict[str, Any]:
    """Name -> value of the options that the output folder of a method records."""
    recorded_names = names(type(options), lambda option: method in option.recorded)
    return {name: getattr(options, name) for name in recorded_names}
