"""A chat as one line of JSON, with everything that its answers were made with; and such a line read again.

This file knows no window: a terminal saves and loads the same lines.
"""

import dataclasses
import datetime
import json
import math
from pathlib import Path
from typing import Any

from onecard.config import options as config_options
from onecard.config.chat import IN_CHINESE, ChatConfig
from onecard.config.generation import BEAM_SAMPLE, GREEDY, SAMPLE, TRAINED, ActiveAdapters, Generation
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import DATA, UserError
from onecard.inference.chat import Chat

LONGEST = 20_000_000  # characters
OTHER_FILE = "Choose a file that was saved here."
LEFT, RIGHT = "answer", "other"  # of two adapters that are compared
TEXTS = ("question", "input", LEFT, RIGHT, "template")
Turns = list[
    dict[str, Any]
]  # question, input, answer, other, and options, adapters and template of the answer
Note = tuple[str, str]  # English, Chinese


def made_by(
    chat: Chat, settings: Generation, adapters_by_side: dict[str, ActiveAdapters], form: str
) -> dict[str, Any]:
    """What an answer was made with, to be saved in its turn. form: the name of a template."""
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Generation)}
    name = chat.template_of(form).name
    return {"options": options, "adapters": _plain(adapters_by_side), "template": name}


def record(
    turns: Turns,
    settings: Generation,
    chat: Chat,
    program: ChatConfig,
    adapters_by_side: dict[str, ActiveAdapters],
    form: str = TRAINED,
    **texts: str,
) -> str:
    """One line: the turns, and everything that the next answer would be made with.

    program: the options that the program was started with; adapters_by_side: the active adapters of LEFT, and
    of RIGHT when two are compared; texts: system, context.
    """
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    about = {
        "time": now,
        "model": program.model_path,
        "lora_path": program.lora_path,
        "versions": chat.versions,
        "engine": chat.engine.name,
        **texts,
        **made_by(chat, settings, adapters_by_side, form),
        "turns": turns,
    }
    return json.dumps(about, ensure_ascii=False) + "\n"


def _plain(adapters_by_side: dict[str, ActiveAdapters]) -> dict[str, dict[str, float]]:
    return {side: dict(active_adapters) for side, active_adapters in adapters_by_side.items()}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A chat as it was saved."""

    turns: Turns
    options: Generation
    adapters_by_side: dict[str, ActiveAdapters]  # {} in a chat of an older version
    template: str | None
    texts: dict[str, str]  # system, context
    versions: dict[str, str]  # of base and adapters that came from the hub


def load(path: Path) -> Saved:
    """The last chat in a file; raises UserError (exit 3), and OSError when it cannot be read."""
    try:
        return read(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError("This is not a saved chat: the file is not text.", OTHER_FILE, DATA) from None


def read(text: str) -> Saved:
    """The last chat in these lines; raises UserError (exit 3)."""
    lines = [line for line in text.split("\n") if line.strip()]  # splitlines() would cut inside of texts
    try:
        if not lines:
            raise ValueError("it is empty")
        if len(text) > LONGEST:
            raise ValueError(f"it is longer than {LONGEST} characters")
        saved = json.loads(lines[-1])
        form = saved.get("template")
        return Saved(
            turns_of(saved["turns"]),
            config_options.build(Generation, saved["options"]),
            _adapters_by_side(saved.get("adapters") or {}),
            form if isinstance(form, str) else None,
            {name: str(saved.get(name) or "") for name in ("system", "context")},
            {str(name): str(text) for name, text in (saved.get("versions") or {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"This is not a saved chat: {error}.", OTHER_FILE, DATA) from None


def turns_of(values: Any) -> Turns:
    """Turns from JSON, checked; raises ValueError, KeyError, TypeError or UserError for anything else."""
    turns = [_turn(value) for value in values]
    if not all("question" in turn and LEFT in turn for turn in turns):
        raise ValueError("a turn lacks its question or answer")
    return turns


def _turn(value: dict[str, Any]) -> dict[str, Any]:
    turn: dict[str, Any] = {key: str(value[key]) for key in TEXTS if key in value}
    if "options" in value:
        turn["options"] = dataclasses.asdict(config_options.build(Generation, value["options"]))
    if "adapters" in value:
        turn["adapters"] = _plain(_adapters_by_side(value["adapters"]))
    return turn


def _adapters_by_side(value: dict[str, dict[str, float]]) -> dict[str, ActiveAdapters]:
    adapters = {}
    for side in (LEFT, RIGHT):
        if side in value:
            adapters[side] = tuple((str(name), float(weight)) for name, weight in value[side].items())
            if not all(math.isfinite(weight) for _, weight in adapters[side]):
                raise ValueError("a weight is not a number")
    return adapters


def fitted(saved: Saved, chat: Chat) -> tuple[Saved, list[Note]]:
    """The chat with everything that this model can use, and notes on what it cannot.

    A mode that the engine lacks is replaced by the nearest one that it has.
    """
    notes: list[Note] = []
    options = saved.options
    if options.mode not in chat.modes():
        mode = SAMPLE if options.mode == BEAM_SAMPLE else GREEDY
        notes.append((f"{chat.engine.name} has no mode {options.mode}: {mode} is used instead",
                      f"{chat.engine.name} 没有 {options.mode} 模式，改用 {mode}"))  # fmt: skip
        options = dataclasses.replace(options, mode=mode)
    for name, before in saved.versions.items():
        now = chat.versions.get(name)
        if now not in (None, before):
            chinese = f"{IN_CHINESE.get(name, name)}当时是 {before}，现在是 {now}"
            notes.append((f"the version of {name} was {before}, and is {now} now", chinese))
    adapters_by_side = {}
    for side, active_adapters in saved.adapters_by_side.items():
        try:
            chat.engine.check_active_adapters(active_adapters)
        except UserError as error:
            notes.append((f"{error.problem} The chosen adapters stay", f"{error.problem} 适配器选择不变"))
        else:
            adapters_by_side[side] = active_adapters
    form = saved.template
    if form in (None, chat.template.name):
        form = TRAINED
    elif form not in data_template.names():
        notes.append((f"there is no template {form} here: {chat.template.name} stays",
                      f"没有模板 {form}，仍用 {chat.template.name}"))  # fmt: skip
        form = None
    else:
        try:
            chat.template_of(form)
        except UserError as error:  # its tokens are not in this vocabulary
            notes.append((f"{error.problem} {chat.template.name} stays",
                          f"{error.problem} 仍用 {chat.template.name}"))  # fmt: skip
            form = None
    return dataclasses.replace(
        saved, options=options, adapters_by_side=adapters_by_side, template=form
    ), notes


def conversation(
    turns: list[dict[str, str]], system: str, key: str = "answer", unfinished: bool = False
) -> Conversation:
    """What the model is shown: the earlier turns, and the last without its answer unless that is continued.

    key: LEFT or RIGHT, the side whose answers count when two are compared.
    """
    spoken = [Turn("system", system)] if system else []
    for turn in turns[:-1]:
        spoken.append(Turn("user", turn["question"], turn.get("input", "")))
        spoken.append(Turn("assistant", turn.get(key) or turn.get("answer", "")))
    last = turns[-1]
    spoken.append(Turn("user", last["question"], last.get("input", "")))
    if unfinished:
        spoken.append(Turn("assistant", last.get(key) or last.get("answer", "")))
    return Conversation(tuple(spoken))
