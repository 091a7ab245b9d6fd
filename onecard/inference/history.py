"""A conversation -> the token ids that fit into the context: the oldest turns are left out as a whole.

The newest question and the system prompt always stay.
"""

import dataclasses
import re

from transformers import PreTrainedTokenizerBase

from onecard.data import encode as data_encode
from onecard.data.conversation import ASSISTANT, Conversation
from onecard.data.template import Template
from onecard.errors import UserError

HALF = re.compile("[\ud800-\udfff]")  # half a character in UTF-16, which no tokenizer can encode


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What the model is shown."""

    ids: list[int]
    answer: list[int]  # the beginning of the answer when one is continued; ids end with it
    left_out: int  # earlier questions, each with its answer


def fit(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    room: int,
    memory: int = 0,
    last_turns: int = 0,
) -> Fitted:
    """The newest turns within `room` tokens; the caller has set aside the tokens for the answer.

    memory: the most tokens of earlier turns and the question together, 0: all of the room; last_turns: the
    most earlier questions, 0: any number. An answer at the end is continued, and so is raw text, of which
    nothing is left out. Raises UserError when the question alone is too long, with both numbers, or when the
    template cannot write it.
    """
    turns, answer = conversation.turns, []
    if any(HALF.search(turn.text + turn.input) for turn in turns):
        raise UserError("The conversation contains half a character.", "Type the message again.")
    if turns and conversation.is_raw:
        return _raw(conversation, template, tokenizer, room)
    if turns and turns[-1].role == ASSISTANT:
        answer = data_encode.encode_text(tokenizer, turns[-1].text)
        turns = turns[:-1]
    system = turns[:1] if turns and turns[0].role == "system" else ()
    starts = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not starts:
        raise UserError("There is no question to answer.", "Write one.")
    first = max(0, len(starts) - 1 - last_turns) if last_turns else 0

    def encoded(start: int) -> list[int]:
        shown = Conversation(turns if start == 0 else system + turns[starts[start] :])
        try:
            return [*data_encode.encode(shown, template, tokenizer)[0], *answer]
        except ValueError as error:
            raise UserError(
                f"The template cannot hold this: {error}.", "Leave it out, or use another --template."
            ) from None

    question = encoded(len(starts) - 1)
    if not question:
        raise UserError("There is no question to answer.", "Write one.")
    if len(question) > room:
        problem = f"Your message has {len(question)} tokens with its template, but only {room} fit."
        raise UserError(problem, "Shorten it, or the system prompt or the context.")
    limit = room if not memory else min(room, max(memory, len(question)))
    low, high, ids = first, len(starts) - 1, question
    while low < high:  # the smallest start that fits
        middle = (low + high) // 2
        shorter = encoded(middle)
        if len(shorter) <= limit:
            high, ids = middle, shorter
        else:
            low = middle + 1
    return Fitted(ids, answer, high)


def _raw(
    conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase, room: int
) -> Fitted:
    ids = data_encode.encode(conversation, template, tokenizer)[0]
    if not ids:
        raise UserError("There is no text to continue.", "Write one.")
    if len(ids) > room:
        raise UserError(f"Your text has {len(ids)} tokens, but only {room} fit.", "Shorten it.")
    return Fitted(ids, [], 0)
