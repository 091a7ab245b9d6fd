"""A conversation: turns of the system, the user, functions and the assistant, or raw text."""

import dataclasses
from typing import NamedTuple

ASSISTANT = "assistant"
RAW = ("context", "text", "prompt", "completion")  # roles of text that no template is written around
TARGETS = (ASSISTANT, "text", "completion")  # roles whose text the model learns to write
ALL = "all"  # value of --train_on: every assistant turn is trained, not just the last


class Turn(NamedTuple):
    """What one side says, or one piece of raw text."""

    role: str  # system, user, function, assistant, or one of RAW
    text: str
    input: str = ""  # only of a user's turn: the material that the instruction is about


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in their order. The last one is a target, or what the model is to answer."""

    turns: tuple[Turn, ...]

    @property
    def is_raw(self) -> bool:
        """Whether this is raw text, which no template is written around."""
        return self.turns[0].role in RAW

    @property
    def question(self) -> "Conversation":
        """The same conversation without its last answer, if it ends with one."""
        has_answer = self.turns[-1].role in TARGETS
        return Conversation(self.turns[:-1]) if has_answer else self


def single(instruction: str, input: str = "", output: str | None = None) -> Conversation:
    """One instruction with an optional input, and its answer when there is one."""
    question = (Turn("user", instruction, input),)
    return Conversation(question if output is None else (*question, Turn(ASSISTANT, output)))
