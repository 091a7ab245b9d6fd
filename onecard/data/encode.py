"""A conversation becomes token ids and is_target flags. Training and chat share this encoder.

The model's turns are encoded apart from everything else, so the ids of a prompt in chat are always the first
ids of the row that was trained. Only the template writes control tokens: inside a row their names are plain
text. The tokenizer of every function is the one of template.tokenizer_for.
"""

import functools
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from onecard.data import template as data_template
from onecard.data.conversation import ALL, ASSISTANT, RAW, TARGETS, Conversation, Turn
from onecard.data.template import Part, Template

Piece = tuple[str | int, bool]  # a text or the id of a control token, and whether it is a target


def encode(
    conversation: Conversation,
    template: Template,
    tokenizer: Any,
    train_on_inputs: bool = False,
    train_on: str = ALL,
) -> tuple[list[int], list[bool]]:
    """Token ids [T] and is_target flags [T] of a whole conversation.

    Targets are the assistant's turns and their end tokens; only the last turn with train_on "last", and all
    tokens but the first with train_on_inputs. Raises ValueError when the template cannot write one of the
    turns.
    """
    row = pieces(conversation, template, tokenizer, train_on_inputs, train_on)
    return _encode_pieces([row], tokenizer)[0]


def encode_many(
    conversations: Sequence[Conversation],
    limit: int,
    templates: Sequence[Template],
    tokenizer: Any,
    *targets: Any,
) -> list[tuple[list[int], list[bool], bool] | ValueError]:
    """The result of encode_within for each conversation and its template, or the ValueError that it raises.

    targets: train_on_inputs and train_on, as encode takes them. All texts go to the tokenizer at once, which
    is several times as fast as one by one.
    """
    rows: list[Any] = []  # pieces, later ids; or an error
    for conversation, template in zip(conversations, templates, strict=True):
        try:
            rows.append(pieces(conversation, template, tokenizer, *targets))
        except ValueError as error:
            rows.append(error)
    encoded = iter(_encode_pieces([row for row in rows if not isinstance(row, ValueError)], tokenizer))
    for index, row in enumerate(rows):
        if not isinstance(row, ValueError):
            conversation, template = conversations[index], templates[index]
            rows[index] = shortened(conversation, next(encoded), limit, template, tokenizer, *targets)
    return rows


def pieces(
    conversation: Conversation,
    template: Template,
    tokenizer: Any,
    train_on_inputs: bool = False,
    train_on: str = ALL,
) -> list[Piece]:
    """The texts and control tokens of a row in their order, each with whether it is a target.

    Raises ValueError when the template cannot write one of the turns.
    """
    row = _PieceBuilder(tokenizer, train_on_inputs)
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
            row.write(_parts_of(template, turn), turn)
    row.flush()
    return row.pieces


def encode_within(
    conversation: Conversation, limit: int, template: Template, tokenizer: Any, *targets: Any
) -> tuple[list[int], list[bool], bool]:
    """Token ids and is_target flags of at most `limit` tokens, and whether something was left out.

    The oldest questions are left out first, each with its answer; the system's turn stays. If the last
    question is still too long, its end is cut off. Raises ValueError as encode does.
    """
    encoded = encode(conversation, template, tokenizer, *targets)
    return shortened(conversation, encoded, limit, template, tokenizer, *targets)


def shortened(
    conversation: Conversation,
    encoded: tuple[list[int], list[bool]],
    limit: int,
    template: Template,
    tokenizer: Any,
    *targets: Any,
) -> tuple[list[int], list[bool], bool]:
    """The result of encode_within for a conversation that encode has encoded already."""
    ids, is_target = encoded
    if len(ids) <= limit:
        return ids, is_target, False
    system = conversation.turns[:1] if conversation.turns[0].role == "system" else ()
    starts = [number for number, turn in enumerate(conversation.turns) if turn.role == "user"]
    low, high = 1, len(starts) - 1  # how many of the oldest questions to leave out
    while low <= high:
        middle = (low + high) // 2
        shorter = Conversation(system + conversation.turns[starts[middle] :])
        shorter_ids, shorter_targets = encode(shorter, template, tokenizer, *targets)
        if len(shorter_ids) <= limit or middle == len(starts) - 1:
            ids, is_target = shorter_ids, shorter_targets
        if len(shorter_ids) <= limit:
            high = middle - 1
        else:
            low = middle + 1
    return ids[:limit], is_target[:limit], True


def eos_ids(template: Template, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's EOS, then the template's own end token if any."""
    ids = [tokenizer.eos_token_id]
    for (before, _), (what, text) in pairwise(template.assistant):
        if before == "{text}" and what == "control":
            ids.append(data_template.token_id(tokenizer, text))
    return list(dict.fromkeys(ids))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of one text, as an answer has them in a row; names of control tokens in it are plain text."""
    return _encode_texts(tokenizer, [text])[0]


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of generated ids, without control tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def show(
    tokenizer: Any, ids: list[int], is_target: list[bool], opening: str = "«", closing: str = "»"
) -> str:
    """A row as text with its control tokens; each run of target tokens stands between the two marks."""
    return "".join(
        f"{opening}{piece}{closing}" if target else piece for piece, target in runs(tokenizer, ids, is_target)
    )


def runs(tokenizer: Any, ids: list[int], is_target: list[bool]) -> list[tuple[str, bool]]:
    """A row as texts with whether they are targets: one for each run of tokens that are alike in that."""
    texts, position = [], 0
    while position < len(ids):
        end = position
        while end < len(ids) and is_target[end] == is_target[position]:
            end += 1
        part = ids[position:end]
        text = tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        texts.append((text, is_target[position]))
        position = end
    return texts


class _PieceBuilder:
    """Collects the pieces of a row; joins texts that follow each other, unless a target begins or ends."""

    def __init__(self, tokenizer: Any, train_on_inputs: bool):
        self.tokenizer, self.train_on_inputs = tokenizer, train_on_inputs
        self.pieces: list[Piece] = [(token, False) for token in _bos_ids(tokenizer)]
        self.waiting = ""

    def write(self, parts: tuple[Part, ...] | None, turn: Turn | None = None, target: bool = False) -> None:
        """Add the parts of a turn. A target's text is joined with nothing before or after it."""
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
        is_repeated = self.pieces and self.pieces[-1][0] == token  # by the tokenizer and by the template
        if not is_repeated or token not in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
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


def _encode_pieces(rows: list[list[Piece]], tokenizer: Any) -> list[tuple[list[int], list[bool]]]:
    """Token ids and is_target flags of each row of pieces."""
    texts = [piece for row in rows for piece, _ in row if isinstance(piece, str)]
    text_ids, encoded = iter(_encode_texts(tokenizer, texts)), []
    for row in rows:
        ids: list[int] = []
        is_target: list[bool] = []
        for piece, target in row:
            tokens = next(text_ids) if isinstance(piece, str) else [piece]
            ids += tokens
            is_target += [target] * len(tokens)
        if is_target:
            is_target[0] = False  # nothing comes before the first token, so nothing can predict it
        encoded.append((ids, is_target))
    return encoded


def _parts_of(template: Template, turn: Turn) -> tuple[Part, ...]:
    """The parts that a turn other than the assistant's is written in; raises ValueError without any."""
    if turn.role == "user" and turn.input:
        beside = (("{text}", ""), ("literal", "\n"), ("{input}", ""))
        return template.user_with_input or tuple(
            inner for part in template.user for inner in (beside if part[0] == "{text}" else (part,))
        )
    parts = getattr(template, turn.role)
    if parts is None:
        raise ValueError(f"the template {template.name} cannot write {turn.role} turns")
    return parts


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of texts. No control token is among them, whatever the texts say."""
    if not texts:
        return []
    encoded = _plain_ids(tokenizer, texts)
    if not _has_control(tokenizer, {token for ids in encoded for token in ids}):
        return encoded
    control = _control_tokens(tokenizer)
    return [
        ids if control.keys().isdisjoint(ids) else _without_control(tokenizer, text, control)
        for ids, text in zip(encoded, texts, strict=True)
    ]


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids


def _has_control(tokenizer: Any, ids: set[int]) -> bool:
    """Whether there is a token of _control_tokens among the ids.

    The tokenizer is asked each time, because tokens can be added to it at any time. To decode the ids twice
    takes microseconds; _control_tokens takes 30 ms where thousands of tokens were added.
    """
    others = list(ids - {tokenizer.unk_token_id})
    if not ids.isdisjoint(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}):
        return True
    with_special, without = (tokenizer.decode(others, skip_special_tokens=skip) for skip in (False, True))
    return bool(with_special != without)


def _control_tokens(tokenizer: Any) -> dict[int, str]:
    """Ids and names of the tokens that the tokenizer lists as special, and of those added as special."""
    added = tokenizer.added_tokens_decoder.items()
    listed = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    control = {token: str(entry) for token, entry in added if entry.special} | dict(listed)
    control.pop(tokenizer.unk_token_id, None)
    return control


def _without_control(tokenizer: Any, text: str, control: dict[int, str]) -> list[int]:
    """Ids of a text for a vocabulary that has control tokens among its ordinary pieces.

    The text is cut inside each of their names. A part that is only normalised to such a name is cut in half,
    until no part gives a control token.
    """
    names = "|".join(re.escape(name) for name in sorted(control.values(), key=len, reverse=True))
    cuts = [0, *(match.start() + 1 for match in re.finditer(names, text)), len(text)]
    parts = [text[start:end] for start, end in pairwise(cuts)]
    while True:
        encoded = list(zip(parts, _plain_ids(tokenizer, parts), strict=True))
        wrong = [len(part) > 1 and not control.keys().isdisjoint(ids) for part, ids in encoded]
        if not any(wrong):  # a single letter that gives one cannot be written otherwise
            return [token for _, ids in encoded for token in ids if token not in control]
        middles = [len(part) // 2 if cut else 0 for part, cut in zip(parts, wrong, strict=True)]
        halves = [(part[:at], part[at:]) for part, at in zip(parts, middles, strict=True)]
        parts = [half for both in halves for half in both if half]


def _bos_ids(tokenizer: Any) -> list[int]:
    """[BOS] for a tokenizer that puts it before every text, otherwise []."""
    # asked each time, which takes 40 microseconds: the tokenizer's settings can change
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
