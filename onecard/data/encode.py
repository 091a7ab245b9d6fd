"""Conversation -> token ids, and which of them are targets. What training and chat share.

The turns of the model are encoded apart from everything else, so the ids of a prompt in chat are always the
first ids of the row that was trained. Control tokens come from the template alone: written inside a row they
are text. Where templates come from: template.py.
"""

import functools
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from onecard.data import template as data_template
from onecard.data.conversation import ALL, ASSISTANT, RAW, TARGETS, Conversation, Turn
from onecard.data.template import Part, Template

Piece = tuple[str | int, bool]  # a text or a control token, and whether it is a target


def encode(
    conversation: Conversation,
    template: Template,
    tokenizer: Any,
    train_on_inputs: bool = False,
    train_on: str = ALL,
) -> tuple[list[int], list[bool]]:
    """Token ids and is_target flags, both of length T, uncut.

    Targets are the assistant's turns (the last one alone with train_on "last") with their end tokens; with
    train_on_inputs all but the first token. Raises ValueError when the template has no such turn.
    """
    return _encoded([pieces(conversation, template, tokenizer, train_on_inputs, train_on)], tokenizer)[0]


def encode_many(
    conversations: Sequence[Conversation],
    limit: int,
    templates: Sequence[Template],
    tokenizer: Any,
    *how: Any,
) -> list[tuple[list[int], list[bool], bool] | ValueError]:
    """encode_within for many rows, each with its template; what one of them raised stands in its place.

    All texts go to the tokenizer at once, which is several times as fast.
    """
    made: list[Any] = []
    for conversation, template in zip(conversations, templates, strict=True):
        try:
            made.append(pieces(conversation, template, tokenizer, *how))
        except ValueError as error:
            made.append(error)
    fitting = iter(_encoded([row for row in made if not isinstance(row, ValueError)], tokenizer))
    for place, row in enumerate(made):
        if not isinstance(row, ValueError):
            made[place] = shortened(
                conversations[place], next(fitting), limit, templates[place], tokenizer, *how
            )
    return made


def pieces(
    conversation: Conversation,
    template: Template,
    tokenizer: Any,
    train_on_inputs: bool = False,
    train_on: str = ALL,
) -> list[Piece]:
    """What a row is made of: texts and control tokens in their order, each with whether it is a target."""
    row = _Row(tokenizer, train_on_inputs)
    turns = conversation.turns
    last = max((i for i, turn in enumerate(turns) if turn.role == ASSISTANT), default=-1)
    if not conversation.is_raw and turns[0].role != "system":
        with_input = turns[0].input and template.opening_with_input is not None
        row.write(template.opening_with_input if with_input else template.opening)
    for number, turn in enumerate(turns):
        if turn.role == "user" and number and turns[number - 1].role == ASSISTANT:
            row.write(template.between)
        if turn.role in RAW:
            row.write((("{text}", ""),), turn, turn.role in TARGETS)
            if turn.role in TARGETS:
                row.write((("{end}", ""),), None, True)
        elif turn.role == ASSISTANT:
            row.write(template.assistant, turn, train_on == ALL or number == last)
        else:
            row.write(_form(template, turn), turn)
    row.flush()
    return row.pieces


def encode_within(
    conversation: Conversation, limit: int, template: Template, tokenizer: Any, *how: Any
) -> tuple[list[int], list[bool], bool]:
    """Like encode, at most `limit` tokens, and whether something was left out.

    Whole oldest turns go first, a question with its answer, never the system's; what is still too long is cut
    at the right.
    """
    encoded = encode(conversation, template, tokenizer, *how)
    return shortened(conversation, encoded, limit, template, tokenizer, *how)


def shortened(
    conversation: Conversation,
    encoded: tuple[list[int], list[bool]],
    limit: int,
    template: Template,
    tokenizer: Any,
    *how: Any,
) -> tuple[list[int], list[bool], bool]:
    """encode_within of a conversation that is encoded already."""
    ids, is_target = encoded
    if len(ids) <= limit:
        return ids, is_target, False
    system = conversation.turns[:1] if conversation.turns[0].role == "system" else ()
    starts = [number for number, turn in enumerate(conversation.turns) if turn.role == "user"]
    low, high = 1, len(starts) - 1  # how many of the oldest to leave out
    while low <= high:
        middle = (low + high) // 2
        shorter = Conversation(system + conversation.turns[starts[middle] :])
        tried = encode(shorter, template, tokenizer, *how)
        if len(tried[0]) <= limit or middle == len(starts) - 1:
            ids, is_target = tried
        if len(tried[0]) <= limit:
            high = middle - 1
        else:
            low = middle + 1
    return ids[:limit], is_target[:limit], True


def ends(template: Template, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's own, and the template's control token there."""
    found = [tokenizer.eos_token_id]
    for (before, _), (what, text) in pairwise(template.assistant):
        if before == "{text}" and what == "control":
            found.append(data_template.token_id(tokenizer, text))
    return list(dict.fromkeys(found))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone, as an answer's are in a row; control tokens in it are text."""
    return _encode_texts(tokenizer, [text])[0]


def decode(tokenizer: Any, ids: list[int]) -> str:
    """Generated ids -> text; the end token is not shown."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def show(
    tokenizer: Any, ids: list[int], is_target: list[bool], opening: str = "«", closing: str = "»"
) -> str:
    """A row as text, runs of target tokens between the two marks, control tokens visible."""
    return "".join(
        f"{opening}{piece}{closing}" if target else piece for piece, target in runs(tokenizer, ids, is_target)
    )


def runs(tokenizer: Any, ids: list[int], is_target: list[bool]) -> list[tuple[str, bool]]:
    """A row as (text, is it trained), one for each run of tokens of one kind."""
    found, position = [], 0
    while position < len(ids):
        end = position
        while end < len(ids) and is_target[end] == is_target[position]:
            end += 1
        piece = tokenizer.decode(
            ids[position:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found.append((piece, is_target[position]))
        position = end
    return found


class _Row:
    """Pieces in the making; texts that follow one another become one."""

    def __init__(self, tokenizer: Any, train_on_inputs: bool):
        self.tokenizer, self.train_on_inputs = tokenizer, train_on_inputs
        self.pieces: list[Piece] = [(token, False) for token in _beginning(tokenizer)]
        self.waiting = ""

    def write(self, parts: tuple[Part, ...] | None, turn: Turn | None = None, target: bool = False) -> None:
        """Add the parts of a turn; a target's texts stand apart from what comes before and behind."""
        if target or (turn is not None and turn.role in (ASSISTANT, *RAW)):
            self.flush()
        for what, text in parts or ():
            if what in ("{end}", "control"):
                self.flush(target)
                self.control(self.tokenizer.eos_token_id if what == "{end}" else self.id_of(text), target)
            else:
                self.waiting += {"{text}": turn and turn.text, "{input}": turn and turn.input}.get(what, text)
        if target or (turn is not None and turn.role in (ASSISTANT, *RAW)):
            self.flush(target)

    def control(self, token: int, target: bool) -> None:
        doubled = self.pieces and self.pieces[-1][0] == token
        if not doubled or token not in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            self.pieces.append((token, target or self.train_on_inputs))

    def flush(self, target: bool = False) -> None:
        if self.waiting:
            self.pieces.append((self.waiting, target or self.train_on_inputs))
        self.waiting = ""

    @functools.cached_property
    def special_tokens(self) -> list[str]:
        return self.tokenizer.all_special_tokens

    def id_of(self, token: str) -> int:
        number = data_template.token_id(self.tokenizer, token)
        assert number is not None, token  # template.load has checked it
        assert token in self.special_tokens, f"{token}: encode with template.tokenizer_for"
        return number


def _encoded(rows: list[list[Piece]], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Ids and flags of rows of pieces."""
    texts = [piece for row in rows for piece, _ in row if isinstance(piece, str)]
    encoded, made = iter(_encode_texts(tokenizer, texts)), []
    for row in rows:
        ids: list[int] = []
        is_target: list[bool] = []
        for piece, target in row:
            tokens = next(encoded) if isinstance(piece, str) else [piece]
            ids += tokens
            is_target += [target] * len(tokens)
        if is_target:
            is_target[0] = False  # nothing comes before the first token, so nothing can predict it
        made.append((ids, is_target))
    return made


def _form(template: Template, turn: Turn) -> tuple[Part, ...]:
    """How a turn that is not the assistant's is written."""
    if turn.role == "user" and turn.input:
        beside = (("{text}", ""), ("literal", "\n"), ("{input}", ""))
        return template.user_with_input or tuple(
            inner for part in template.user for inner in (beside if part[0] == "{text}" else (part,))
        )
    form = getattr(template, turn.role)
    if form is None:
        raise ValueError(f"template {template.name} has no {turn.role} turn")
    return form


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of texts in which no control token can appear, whatever they say."""
    if not texts:
        return []
    encoded = _plain_ids(tokenizer, texts)
    control = _control_tokens(tokenizer)
    return [
        ids if control.keys().isdisjoint(ids) else _without_control(tokenizer, text, control)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and names: those the tokenizer lists, a template's among them, and what was added as special."""
    listed = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    found = {**_added_as_special(tokenizer), **dict(listed)}
    found.pop(tokenizer.unk_token_id, None)
    return found


@functools.lru_cache(maxsize=4)
def _added_as_special(tokenizer: Any) -> dict[int, str]:
    added = tokenizer.added_tokens_decoder.items()  # thousands where a vocabulary was extended
    return {token: str(what) for token, what in added if what.special}


def _without_control(tokenizer: Any, text: str, control: dict[int, str]) -> list[int]:
    """Some vocabularies hold control tokens beside their pieces: cut the text inside each of their names, and
    what is normalised to a name in halves."""
    names = "|".join(re.escape(name) for name in sorted(control.values(), key=len, reverse=True))
    cuts = [0, *(found.start() + 1 for found in re.finditer(names, text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(cuts)]
    while True:
        encoded = list(zip(parts, _plain_ids(tokenizer, parts), strict=True))
        wrong = [len(part) > 1 and not control.keys().isdisjoint(ids) for part, ids in encoded]
        if not any(wrong):  # a single letter that is one has no other spelling
            return [token for _, ids in encoded for token in ids if token not in control]
        middles = [len(part) // 2 if cut else 0 for part, cut in zip(parts, wrong, strict=True)]
        halves = [(part[:at], part[at:]) for part, at in zip(parts, middles, strict=True)]
        parts = [half for both in halves for half in both if half]


@functools.lru_cache(maxsize=4)
def _beginning(tokenizer: Any) -> list[int]:
    """[bos] for tokenizers that put it before every text of their own accord, else []."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
