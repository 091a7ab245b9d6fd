"""Token ids of a growing answer -> the text that a reader sees. Each token is decoded only a few times.

The text that is shown never ends inside a character, and never ends with the beginning of a stop word. This
file knows no engines and no conversations.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from onecard.inference.decoding import BANNED, GOES, STOPS, Step

BROKEN = "\ufffd"  # how a decoder writes bytes that are no character (yet)
CONTEXT = 4  # about so many finished tokens are decoded again with the next one
LONGEST = 3  # tokens that a character can go on for after its first; a character has four bytes at most


@dataclasses.dataclass(frozen=True)
class PartialText:
    """An answer that may still grow: `stable` is never taken back, `open` may still change."""

    stable: str
    open: str = ""
    beams: tuple[str, ...] = ()  # the whole text of each beam, the best first
    tokens: int = 0
    finished: str = ""  # why it ended, "" while it grows

    @property
    def whole(self) -> str:
        return self.stable + self.open


def grow(
    tokenizer: Any, steps: Iterable[Step], stops: list[str], before: list[int] | None = None
) -> Iterator[PartialText]:
    """The text after each step.

    before: the tokens that the answer begins with, when an earlier answer is continued.
    """
    before = before or []
    window = Detokenizer(tokenizer)
    window.push(before)
    beams = _Branches(window.copy())
    read, length_before = 0, len(window.text)
    for step in steps:
        best = step.beams[0]
        if step.finished:
            # all beams share the stable tokens, which the window has read
            texts = [_ended(window.copy(), ids[read:], stops, length_before) for ids in step.beams]
            yield PartialText(texts[0], "", tuple(texts), len(best), step.finished)
            return
        window.push(best[read : step.stable])
        read = step.stable
        stable = _held_back(window.text, stops).strip()
        windows = [window if len(ids) == read else beams.of(ids) for ids in step.beams]
        whole = tuple(one.with_tail([]).strip() for one in windows)
        unsettled = len(step.beams) > 1 or read < len(best)
        opened = whole[0][len(stable) :] if unsettled else ""
        yield PartialText(stable, opened, whole, len(best))


def beginning(tokenizer: Any, before: list[int], stops: list[str]) -> PartialText:
    """The text of an answer that will be continued; before: its tokens."""
    whole = final(tokenizer, before, [])
    stable = _held_back(whole, stops).strip()
    return PartialText(stable, whole[len(stable) :], (whole,))


def final(tokenizer: Any, ids: list[int], stops: list[str], before: list[int] | None = None) -> str:
    """The whole text up to the first stop word; a stop word inside the tokens of `before` does not count."""
    window = Detokenizer(tokenizer)
    window.push(before or [])
    return _ended(window, ids, stops, len(window.text))


def _ended(window: "Detokenizer", ids: list[int], stops: list[str], length_before: int) -> str:
    """The whole text with these last tokens.

    length_before: characters that the answer began with; a stop word inside them does not count.
    """
    window.push(ids)
    text = window.with_tail([])
    indices = [text.find(stop, max(0, length_before + 1 - len(stop))) for stop in stops]
    ends = [index for index in indices if index >= 0]
    return text[: min(ends)].strip() if ends else text.strip()


class Detokenizer:
    """The text of a growing list of tokens; only those since the last whole character are decoded again."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = (token for token, entry in added.items() if entry.special)
        self.hidden = {*tokenizer.all_special_ids, *special}  # tokens that are never shown
        self.byte_tokens = _byte_tokens(tokenizer)
        self.bytes = {token: byte for byte, token in enumerate(self.byte_tokens)}
        self.text = ""
        self.context: list[int] = []  # tokens that `text` ends with; they shape the text of the next token
        self.context_text = ""
        self.waiting: list[int] = []  # tokens that are not a whole character yet

    def copy(self) -> "Detokenizer":
        other = copy.copy(self)
        other.waiting = list(self.waiting)
        return other

    def push(self, ids: list[int]) -> None:
        for token in ids:
            if token in self.hidden:
                continue
            self.waiting.append(token)
            new = self._new(self.waiting)
            if new and not new.endswith(BROKEN):
                self._out(new, len(self.waiting))
            elif len(self.waiting) > LONGEST:  # the oldest of them will never become a character
                self._out_oldest(new)

    def with_tail(self, ids: list[int]) -> str:
        """The text with these tokens after it, without a broken character at its end."""
        return self.text + self.tail(ids).rstrip(BROKEN)

    def tail(self, ids: list[int]) -> str:
        """The text that these tokens add to `text`."""
        waiting = [*self.waiting, *(token for token in ids if token not in self.hidden)]
        return self._new(waiting) if waiting else ""

    def _out_oldest(self, new: str) -> None:
        """Write the tokens that stay broken, unless their character goes on in the tokens after them."""
        oldest, rest = self.waiting[:-LONGEST], self.waiting[-LONGEST:]
        text = self._new(oldest)
        apart = self._decode([*oldest, *rest]) == self._decode(oldest) + new[len(text) :]
        if (text or not new) and new.startswith(text) and apart:
            self._out(text, len(oldest))

    def _out(self, text: str, count: int) -> None:
        self.text += text
        out, self.waiting = self.waiting[:count], self.waiting[count:]
        if len(self.context) < CONTEXT:
            self.context, self.context_text = [*self.context, *out], self.context_text + text
        else:
            self.context, self.context_text = out, self._decode(out)

    def _new(self, ids: list[int]) -> str:
        return self._decode([*self.context, *ids])[len(self.context_text) :]

    def _decode(self, ids: list[int]) -> str:
        ids = ids if self.bytes.keys().isdisjoint(ids) else self._with_broken_bytes_as_text(ids)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _with_broken_bytes_as_text(self, ids: list[int]) -> list[int]:
        """The ids, where bytes that are not a character are replaced by the bytes of the sign for them.

        A decoder that meets such bytes takes all bytes beside them for broken too, and with them text that
        was shown already.
        """
        valid: list[int] = []
        for are_bytes, run in itertools.groupby(ids, self.bytes.__contains__):
            if are_bytes:
                text = bytes(self.bytes[token] for token in run).decode("utf-8", "replace")
                valid += [self.byte_tokens[byte] for byte in text.encode()]
            else:
                valid += run
        return valid


def _byte_tokens(tokenizer: Any) -> list[int]:
    """The tokens of the 256 bytes; [] where the tokenizer has none for what its vocabulary lacks."""
    unknown = (None, tokenizer.unk_token_id)
    if tokenizer.convert_tokens_to_ids("<0x00>") in unknown:
        return []
    tokens = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return [] if any(token in unknown for token in tokens) else tokens


class _Branches:
    """Detokenizers of beams, which grow by a token each step; each is a copy of the one that it grew from."""

    def __init__(self, start: Detokenizer):
        self.start = start
        self.recent: list[tuple[list[int], Detokenizer]] = []

    def of(self, ids: list[int]) -> Detokenizer:
        parents = [entry for entry in self.recent if ids[: len(entry[0])] == entry[0]]
        read, window = max(parents, key=lambda entry: len(entry[0]), default=([], self.start))
        if len(read) < len(ids):
            window = window.copy()
            window.push(ids[len(read) :])
            recent = [entry for entry in self.recent if len(entry[0]) >= len(ids) - 1]
            self.recent = [*recent, (ids, window)]
        return window


class Watch:
    """Tells whether the newest token of an answer completes a stop word or a banned phrase."""

    def __init__(self, tokenizer: Any, stops: list[str], banned: list[str], before: list[int] | None = None):
        self.stops, self.banned = stops, banned
        start = Detokenizer(tokenizer)
        start.push(before or [])
        self.branches = _Branches(start)

    def __call__(self, ids: list[int]) -> str:
        window = self.branches.of(ids[:-1])
        new = window.tail(ids[-1:]).rstrip(BROKEN)

        def completes(phrase: str) -> bool:  # a phrase that ended earlier was noticed then
            return phrase in window.text[max(0, len(window.text) + 1 - len(phrase)) :] + new

        if any(map(completes, self.banned)):
            return BANNED
        return STOPS if any(map(completes, self.stops)) else GOES


def watch(
    tokenizer: Any, stops: list[str], banned: list[str], before: list[int] | None = None
) -> Watch | None:
    """The watch for decoding.decode, None where there is nothing to watch for.

    before: the tokens that the answer begins with, when an earlier answer is continued.
    """
    return Watch(tokenizer, stops, banned, before) if stops or banned else None


def _held_back(text: str, stops: list[str]) -> str:
    """The text without an end that a stop word begins with."""
    longest = max(
        (
            length
            for stop in stops
            for length in range(1, min(len(stop), len(text)) + 1)
            if text.endswith(stop[:length])
        ),
        default=0,
    )
    return text[: len(text) - longest]
