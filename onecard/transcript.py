"""A chat as one line of JSON, with everything that made its answers; and back."""

import dataclasses
import datetime
import json
from typing import Any

from onecard import parsing
from onecard.chat_config import Generation
from onecard.errors import DATA, UserError

LONGEST = 20_000_000  # characters


def record(turns: list[dict[str, Any]], settings: Generation, **about: Any) -> str:
    """One line: the turns, all options of the answers (those of the last one), and what else is told."""
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Generation)}
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return json.dumps({"time": now, **about, "options": options, "turns": turns}, ensure_ascii=False) + "\n"


def read(text: str) -> tuple[list[dict[str, Any]], Generation, dict[str, Any]]:
    """Turns, options and the rest of the last chat in a file; raises UserError (exit 3)."""
    fix = "Choose a file that was saved here."
    lines = [line for line in text.split("\n") if line.strip()]  # a text may hold other kinds of line ends
    try:
        if len(text) > LONGEST or not lines:
            raise ValueError("it is empty, or too long")
        saved = json.loads(lines[-1])
        turns = [
            {key: str(turn[key]) for key in ("question", "input", "answer", "other") if key in turn}
            for turn in saved.pop("turns")
        ]
        if not all("question" in turn and "answer" in turn for turn in turns):
            raise ValueError("a turn lacks its question or answer")
        settings = parsing.build(Generation, saved.pop("options"))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"This is no saved chat: {error}.", fix, DATA) from None
    return turns, settings, saved
