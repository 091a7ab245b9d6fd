"""A conversation: turns of system, user and assistant, or raw text."""

import dataclasses
from typing import NamedTuple

ASSISTANT = "assistant"
RAW = ("context", "text", "prompt", "completion")  # written as they are, by no template
TARGETS = (ASSISTANT, "text", "completion")
ALL, LAST = "all", "last"  # assistant turns that are trained


class Turn(NamedTuple):
    role: str  # system, user, function, assistant, or one of RAW
    text: str
    input: str = ""  # of a user's turn: what an instruction is about


@dataclasses.dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in their order; it ends with a target, or with what the model shall answer."""

    turns: tuple[Turn, ...]

    @property
    def is_raw(self) -> bool:
        return self.turns[0].role in RAW

    @property
    def question(self) -> "Conversation":
        """The same without its last answer."""
        answered = self.turns[-1].role in TARGETS
        return Conversation(self.turns[:-1]) if answered else self


def single(instruction: str, input: str = "", output: str | None = None) -> Conversation:
    """One instruction with an optional input, and its answer."""
    asked = (Turn("user", instruction, input),)
    return Conversation(asked if output is None else (*asked, Turn(ASSISTANT, output)))
