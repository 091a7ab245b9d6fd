"""A chat as one line of JSON, with everything that made its answers; and back, as far as it can be had here.

It knows no window: a terminal saves and loads the same lines.
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
from onecard.data import template as templates
from onecard.data.conversation import Conversation, Turn
from onecard.errors import DATA, UserError
from onecard.inference.chat import Chat

LONGEST = 20_000_000  # characters
OTHER_FILE = "Choose a file that was saved here."
LEFT, RIGHT = "answer", "other"  # of two adapters that are compared
TEXTS = ("question", "input", LEFT, RIGHT, "template")
Turns = list[dict[str, Any]]  # question, input, answer, other; options, adapters and template that made them
Note = tuple[str, str]  # English, Chinese


def made_by(
    chat: Chat, settings: Generation, adapters_by_side: dict[str, ActiveAdapters], form: str
) -> dict[str, Any]:
    """What made an answer, for its turn. form: name of a template."""
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
    """One line: the turns, and all that the next answer would be made with.

    program: the options it was started with; adapters_by_side: the active adapters of LEFT, and of RIGHT when
    two are compared; texts: system, context.
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
        raise UserError("This is no saved chat: it is no text.", OTHER_FILE, DATA) from None


def read(text: str) -> Saved:
    """The last chat in these lines; raises UserError (exit 3)."""
    lines = [line for line in text.split("\n") if line.strip()]  # a text may hold other kinds of line ends
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
        raise UserError(f"This is no saved chat: {error}.", OTHER_FILE, DATA) from None


def turns_of(values: Any) -> Turns:
    """Turns that came as JSON, checked; raises one of several errors for what cannot be turns."""
    turns = [_turn(value) for value in values]
    if not all("question" in turn and LEFT in turn for turn in turns):
        raise ValueError("a turn lacks its question or answer")
    return turns


def _turn(value: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {key: str(value[key]) for key in TEXTS if key in value}
    if "options" in value:
        made["options"] = dataclasses.asdict(config_options.build(Generation, value["options"]))
    if "adapters" in value:
        made["adapters"] = _plain(_adapters_by_side(value["adapters"]))
    return made


def _adapters_by_side(value: dict[str, dict[str, float]]) -> dict[str, ActiveAdapters]:
    found = {}
    for side in (LEFT, RIGHT):
        if side in value:
            found[side] = tuple((str(name), float(weight)) for name, weight in value[side].items())
            if not all(math.isfinite(weight) for _, weight in found[side]):
                raise ValueError("a weight is no number")
    return found


def fitted(saved: Saved, chat: Chat) -> tuple[Saved, list[Note]]:
    """The chat with what of it can be had here, and notes on what cannot.

    A mode that the engine lacks becomes the nearest that it has.
    """
    notes: list[Note] = []
    options = saved.options
    if options.mode not in chat.modes():
        mode = SAMPLE if options.mode == BEAM_SAMPLE else GREEDY
        notes.append((f"mode {options.mode} is not there with {chat.engine.name}: {mode} instead",
                      f"{chat.engine.name} 没有 {options.mode} 模式，改用 {mode}"))  # fmt: skip
        options = dataclasses.replace(options, mode=mode)
    for name, before in saved.versions.items():
        now = chat.versions.get(name)
        if now not in (None, before):
            chinese = f"{IN_CHINESE.get(name, name)}当时是 {before}，现在是 {now}"
            notes.append((f"{name} was {before}, now it is {now}", chinese))
    adapters_by_side = {}
    for side, active_adapters in saved.adapters_by_side.items():
        try:
            chat.engine.check_active_adapters(active_adapters)
        except UserError as error:
            notes.append((f"{error.problem} The choice stays as it is", f"{error.problem} 适配器选择不变"))
        else:
            adapters_by_side[side] = active_adapters
    form = saved.template
    if form in (None, chat.template.name):
        form = TRAINED
    elif form not in templates.names():
        notes.append((f"template {form} is not here: {chat.template.name} stays",
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
    """What the model is asked: earlier turns whole, the last one without its answer unless that goes on.

    key: which answers count, of two side by side.
    """
    made = [Turn("system", system)] if system else []
    for turn in turns[:-1]:
        made.append(Turn("user", turn["question"], turn.get("input", "")))
        made.append(Turn("assistant", turn.get(key) or turn.get("answer", "")))
    last = turns[-1]
    made.append(Turn("user", last["question"], last.get("input", "")))
    if unfinished:
        made.append(Turn("assistant", last.get(key) or last.get("answer", "")))
    return Conversation(tuple(made))
