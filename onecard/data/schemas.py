"""Reads a row of any known schema as a conversation; each schema has one small function.

The keys of a row tell its schema, so neither the order of rows nor a registry matters. This file knows no
files, templates or tokens.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.data.conversation import ASSISTANT, Conversation, Turn

ROLES = {  # role in a data set -> role of a turn
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "bot": ASSISTANT,
    "function_call": ASSISTANT,
    "function": "function",
    "observation": "function",
    "tool": "function",
}


@dataclasses.dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    line: int  # where the row becomes wrong, from 1; or the number of the row, where a file has no lines
    column: int  # from 1, or 0 where a file has no columns
    reason: str
    text: str  # of the whole row
    near: str = ""  # the text around line and column
    file: str = ""

    def describe(self, path: Path) -> str:
        """Where the row is in this file, the reason, and some of the text there."""
        excerpt = " ".join((self.near or self.text)[:80].split())
        return f"{location(path, self.line, self.column)}: {self.reason}; near: {excerpt!r}"


def location(path: Path, line: int, column: int) -> str:
    """Where a row is, for messages. A column of 0 means that `line` is the number of a row."""
    return f"{path}:{line}:{column}" if column else f"{path}: row {line}"


class RowError(ValueError):
    """Why a row cannot be used."""


def conversation(value: Any, schema: str | None = None) -> Conversation:
    """A row's JSON value as a conversation. schema: the name of one, or None to tell it by the row's keys.

    Raises RowError with the reason when the row cannot be used.
    """
    if schema not in (None, "dialogue") and not isinstance(value, dict):
        raise RowError(f"a row must be an object, but is {kind(value)}")
    turns = SCHEMAS[schema or recognise(value)](value)
    check(turns)
    return turns


def recognise(value: Any) -> str:
    """The name of the schema that a row's keys show. Raises RowError when there is none."""
    if isinstance(value, list):
        return "dialogue"
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object, but is {kind(value)}")
    present = {key for key, field in value.items() if field is not None}
    for name, keys in KEYS.items():
        if keys <= present and not (name == "chat" and not isinstance(value["input"], list)):
            return name
    for keys in KEYS.values():  # of a row that has an instruction, say which key is missing
        if "instruction" in keys & present:
            raise RowError(f"the row has no {min(keys - present)!r}")
    first_keys = ", ".join(map(str, list(value)[:8])) or "none"
    schemas = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in KEYS.items())
    raise RowError(f"a row with the keys {first_keys} has no known schema ({schemas})")


def alpaca(value: Any) -> Conversation:
    """Stanford Alpaca: instruction, input and output, perhaps with a history."""
    earlier = _history(value) if value.get("history") else []
    turns = [*earlier, _user(value), Turn(ASSISTANT, _text(value, "output"))]
    return Conversation((*_system(value), *turns))


def dialogue(value: Any) -> Conversation:
    """CuteGPT: a list of Alpaca rows is one conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        raise RowError("a row that is a list must be one of {instruction, input, output} objects")
    turns = []
    for row in value:
        turns += [_user(row), Turn(ASSISTANT, _text(row, "output"))]
    return Conversation(tuple(turns))


def chat(value: Any) -> Conversation:
    """Chinese-Vicuna: a list of questions and a list of answers."""
    questions, answers = (_list(value, key) for key in ("input", "output"))
    if len(questions) != len(answers):
        raise RowError(f"'input' has {len(questions)} turns, 'output' has {len(answers)}")
    turns = []
    for question, answer in zip(questions, answers, strict=True):
        turns += [Turn("user", _checked(question, "input")), Turn(ASSISTANT, _checked(answer, "output"))]
    return Conversation((*_system(value), *turns))


def chitchat(value: Any) -> Conversation:
    """One question and its answer; earlier turns stand in `history`, as objects or pairs."""
    last = [Turn("user", _text(value, "input")), Turn(ASSISTANT, _text(value, "output"))]
    return Conversation((*_system(value), *_history(value), *last))


def sharegpt(value: Any) -> Conversation:
    """ShareGPT: a list of turns with `from` and `value`."""
    turns = _turns(_list(value, "conversations"), "from", "value")
    return Conversation((*_system(value), *turns))


def openai(value: Any) -> Conversation:
    """OpenAI: a list of messages with `role` and `content`."""
    turns = _turns(_list(value, "messages"), "role", "content")
    return Conversation((*_system(value), *turns))


def text(value: Any) -> Conversation:
    """Raw text in `text`."""
    return Conversation((Turn("text", _text(value, "text")),))


def content(value: Any) -> Conversation:
    """Raw text in `content`."""
    return Conversation((Turn("text", _text(value, "content")),))


def context_completion(value: Any) -> Conversation:
    """Raw text of which only the completion is trained."""
    before = _text(value, "context", optional=True)
    turns = (Turn("context", before),) if before else ()
    return Conversation((*turns, Turn("text", _text(value, "completion"))))


def prompt_completion(value: Any) -> Conversation:
    """A prompt and its completion, written without a template."""
    return Conversation(
        (Turn("prompt", _text(value, "prompt")), Turn("completion", _text(value, "completion")))
    )


KEYS = {  # schema -> its keys; a row has the first schema all of whose keys it has
    "openai": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "chitchat": {"history", "input", "output"},
    "chat": {"input", "output"},
    "prompt_completion": {"prompt", "completion"},
    "context_completion": {"context", "completion"},
    "text": {"text"},
    "content": {"content"},
}
SCHEMAS: dict[str, Callable[[Any], Conversation]] = {name: globals()[name] for name in (*KEYS, "dialogue")}


def check(conversation: Conversation) -> None:
    """Raise RowError when the turns are no conversation. Nothing is repaired or merged silently."""
    turns = conversation.turns
    if conversation.is_raw:
        if not turns[-1].text.strip():
            raise RowError(f"{turns[-1].role!r} is empty")
        return
    expected = {"user"}
    for number, turn in enumerate(turns[1:] if turns and turns[0].role == "system" else turns, start=1):
        if turn.role not in expected:
            roles = " or ".join(sorted(expected))
            raise RowError(f"turn {number} is the {turn.role}'s, expected the {roles}'s")
        if not turn.text.strip() and not (turn.role == ASSISTANT and len(turns) == 2):
            raise RowError(f"turn {number}, the {turn.role}'s, is empty")
        expected = {"user", "function"} if turn.role == ASSISTANT else {ASSISTANT}
    if not turns or turns[-1].role != ASSISTANT:
        raise RowError("the last turn is not the assistant's, so there is nothing to learn")


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _user(row: Any) -> Turn:
    turn = Turn("user", _text(row, "instruction"), _text(row, "input", optional=True))
    if not turn.text.strip():
        raise RowError("'instruction' is empty")
    return turn


def _history(value: dict[str, Any]) -> list[Turn]:
    turns = []
    for item in _list(value, "history"):
        if isinstance(item, list) and len(item) == 2:
            item = {"input": item[0], "output": item[1]}
        turns += [Turn("user", _text(item, "input")), Turn(ASSISTANT, _text(item, "output"))]
    return turns


def _system(value: dict[str, Any]) -> list[Turn]:
    system = _text(value, "system", optional=True)
    return [Turn("system", system)] if system.strip() else []


def _turns(items: list[Any], role_key: str, text_key: str) -> list[Turn]:
    turns = []
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise RowError(f"turn {number} must be an object, but is {kind(item)}")
        name = _text(item, role_key)
        if name not in ROLES:
            raise RowError(f"turn {number}: the role {name[:40]!r} is not known")
        if item.get("tool_calls"):
            raise RowError(f"turn {number} holds tool_calls; write the call as text")
        turns.append(Turn(ROLES[name], _text(item, text_key)))
    return turns


def _text(value: Any, key: str, optional: bool = False) -> str:
    if not isinstance(value, dict):
        raise RowError(f"a turn must be an object, but is {kind(value)}")
    if optional and value.get(key) is None:
        return ""
    if key not in value:
        raise RowError(f"the row has no {key!r}")
    return _checked(value[key], key)


def _checked(field: Any, key: str) -> str:
    parts = field if isinstance(field, list) and field else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        field = "".join(_text(part, "text") for part in parts)  # OpenAI's content in parts
    if not isinstance(field, str):
        raise RowError(f"{key!r} must be text, but is {kind(field)}")
    if SURROGATE.search(field):
        raise RowError(f"{key!r} holds bytes that are not UTF-8, or half of a surrogate pair")
    return field


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, dict) or not isinstance(value.get(key), list):
        field = value.get(key) if isinstance(value, dict) else value
        raise RowError(f"{key!r} must be a list, but is {kind(field)}")
    if not value[key] and key != "history":
        raise RowError(f"{key!r} is empty")
    return value[key]


SURROGATE = re.compile("[\ud800-\udfff]")
