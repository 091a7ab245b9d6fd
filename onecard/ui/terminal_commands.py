"""The commands of a chat in a terminal: what each does to the session, and its line in /help.

A command raises UserError when it cannot be done; then the session stays as it was.
"""

import contextlib
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.generation import BASE, SEVERAL_TURNS, TRAINED, Generation
from onecard.data import template as data_template
from onecard.errors import UserError
from onecard.inference import transcript
from onecard.inference.transcript import LEFT, RIGHT
from onecard.system import files as system_files
from onecard.ui.terminal_io import tell
from onecard.ui.terminal_session import Session

COLUMN = 48  # of /help, where the explanations begin
NONE, AS_TRAINED = "none", "trained"


def clear(session: Session, _: str) -> None:
    session.turns, session.before, session.question = [], [], ""
    tell("A new conversation.")


def retry(session: Session, _: str) -> None:
    session.retry()


def save(session: Session, name: str) -> None:
    if not session.turns:
        raise UserError("There is nothing to save yet.")
    path = _at_home(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
    if path.suffix != ".jsonl":
        raise UserError(f"/save {name}: a chat is saved as a line of JSON.", "Name a .jsonl file.")
    settings = session.settings
    made_by = (settings, session.chat, settings, {LEFT: session.active_adapters}, session.template_name)
    line = transcript.record(session.turns, *made_by, system=settings.system, context="")
    try:
        _append(path, line)
    except OSError as error:
        raise UserError(f"/save {path}: {error.strerror}.", "Name another file.") from None
    tell(f"Saved as a new line of {path}")


def load(session: Session, name: str) -> None:
    if not name:
        raise UserError("/load needs a file.", "Name a saved chat: /load FILE.jsonl.")
    try:
        chat = transcript.load(_at_home(name))
    except (OSError, ValueError) as error:  # a ValueError comes from a name that holds a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"/load {name}: {reason}.", "Name a saved chat.") from None
    saved, notes = transcript.fitted(chat, session.chat)
    options = dataclasses.asdict(saved.options)
    session.active_adapters = saved.adapters_by_side.get(LEFT, session.active_adapters)
    session.template_name = session.template_name if saved.template is None else saved.template
    system = saved.texts["system"]
    if system and not session.has_system():
        notes.append((f"the system prompt is left out: {session.no_system()}", ""))
        system = ""
    if saved.texts["context"]:
        notes.append(("the context box is left out: a terminal has none", ""))
    if RIGHT in saved.adapters_by_side:
        notes.append(("a terminal cannot compare: the first of two adapters answers", ""))
    session.settings = dataclasses.replace(session.settings, **options, system=system)
    session.turns, session.before, session.question = saved.turns, saved.turns[:-1], ""
    if saved.turns:
        session.question, session.input = saved.turns[-1]["question"], saved.turns[-1].get("input", "")
    number = len(saved.turns)
    tell(f"Loaded: {number} turn{'s' * (number != 1)}, options, adapters and template.")
    for note, _ in notes:
        tell(f"different from the saved chat: {note}")


def template(session: Session, name: str) -> None:
    if name:
        template_name = TRAINED if name == AS_TRAINED else name
        session.chat.template_of(template_name)
        session.template_name = template_name
        if session.settings.system and not session.has_system():
            session.settings = dataclasses.replace(session.settings, system="")
            tell(f"the system prompt is removed: {session.no_system()}")
    as_trained = f" ({AS_TRAINED})" if session.template_name == TRAINED else ""
    active = session.chat.template_of(session.template_name).name
    tell(f"template: {active}{as_trained}; available: {', '.join([AS_TRAINED, *data_template.names()])}")


def adapter(session: Session, words: str) -> None:
    engine = session.chat.engine
    if words:
        adapters = () if words == BASE else tuple(_weighted(word) for word in words.split())
        names = [name for name, _ in adapters]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise UserError(f"/adapter {words}: {', '.join(sorted(twice))} is named twice.")
        engine.check_active_adapters(adapters)
        session.active_adapters = adapters
    active = " + ".join(f"{name} (weight {weight:g})" for name, weight in session.active_adapters)
    tell(f"active: {active or 'the base model alone'}; loaded: {', '.join([BASE, *engine.adapters])}")


def params(session: Session, words: str) -> None:
    fields = {field.name: field for field in dataclasses.fields(Generation)}
    shown = list(fields)
    if words in fields:
        shown = [words]
    elif words:
        values: dict[str, Any] = _assignments(words)
        shown = list(values)
        for name in fields.keys() & values.keys():
            if fields[name].default is None and values[name].lower() == NONE:
                values[name] = None
        try:
            options = config_options.build(Generation, values, "/params")
        except UserError as error:
            raise UserError(error.problem, "/params lists all.") from None
        if "mode" in values:
            session.chat.check_mode(options.mode)
        changes = {name: getattr(options, name) for name in values}
        session.settings = dataclasses.replace(session.settings, **changes)
    idle = session.chat.unused(session.settings.mode)
    if session.single_turn:
        turns = declaration.without_effect(Generation, [SEVERAL_TURNS])
        idle |= dict.fromkeys(turns, ("each question is a conversation of its own", ""))
    for name in shown:
        value = getattr(session.settings, name)
        text = NONE if value is None else repr(value) if value == "" else value
        tell(f"{name:<22}{text}" + (f"  (has no effect now: {idle[name][0]})" if name in idle else ""))


def system(session: Session, text: str) -> None:
    if not session.has_system():
        raise UserError(session.no_system())
    if text:
        prompt = "" if text == NONE else text
        session.settings = dataclasses.replace(session.settings, system=prompt)
    tell(f"system prompt: {session.settings.system or NONE}")


def list_commands(session: Session, _: str) -> None:
    for name, (_, arguments, explanation) in COMMANDS.items():
        tell(f"/{name} {arguments}".ljust(COLUMN) + explanation)
    tell("/exit".ljust(COLUMN) + "leave, as Ctrl-D does")


Command = tuple[Callable[[Session, str], None], str, str]  # what it does, its arguments, its explanation
COMMANDS: dict[str, Command] = {
    "clear": (clear, "", "begin a new conversation"),
    "retry": (retry, "", "answer the last question again"),
    "save": (save, "[FILE.jsonl]", "add the conversation and its options to a file"),
    "load": (load, "FILE.jsonl", "continue the last conversation in a file, with its options"),
    "adapter": (adapter, f"[{BASE} | NAME | NAME:0.5 OTHER:0.5]", "show or choose the adapters that answer"),
    "params": (params, "[NAME VALUE | NAME=VALUE ...]", "show or change options of the next answers"),
    "template": (template, f"[{AS_TRAINED} | NAME]", "show or choose the prompt template"),
    "system": (system, f"[TEXT | {NONE}]", "show or change the system prompt"),
    "help": (list_commands, "", "list the commands"),
}


def run(session: Session, name: str, arguments: str) -> None:
    """Do the command of this name; raises UserError when there is none."""
    if name not in COMMANDS:
        names = " ".join(f"/{name}" for name in [*COMMANDS, "exit"])
        fix = f"Commands: {names}. A message that begins with / is written with //."
        raise UserError(f"There is no command /{name}.", fix)
    COMMANDS[name][0](session, arguments)


def _weighted(word: str) -> tuple[str, float]:
    """An adapter and its weight, of NAME or NAME:WEIGHT."""
    name, colon, number = word.rpartition(":")
    if not colon:
        return word, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(number)):
            return name, weight
    raise UserError(f"/adapter {word}: {number!r} is not a weight.", "Write NAME:0.5.")


def _at_home(name: str) -> Path:
    """A path that may begin with ~; ~ and an unknown user is a name like any other."""
    with contextlib.suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


def _assignments(text: str) -> dict[str, str]:
    """Values by name, of `NAME VALUE` or `NAME=VALUE NAME=VALUE`."""
    if re.match(r"\w+\s*=", text):
        parts = [part.partition("=") for part in re.split(r"\s+(?=\w+\s*=)", text)]
        return {name.strip(): value.strip() for name, _, value in parts}
    name, *value = text.split(maxsplit=1)
    return {name: " ".join(value)}


def _append(path: Path, line: str) -> None:
    """Add a line to a file, as a line of its own even when the last one was cut off."""
    last = b""
    if path.exists():
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            last = file.read(1)
    system_files.append(path, (b"" if last in (b"", b"\n") else b"\n") + line.encode("utf-8", "replace"))
