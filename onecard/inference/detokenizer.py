"""Token ids of a growing answer -> the text a reader sees, each token decoded a few times.

Shown text never breaks a character, and never holds the beginning of what may become a stop word. It does not
know engines or conversations.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from onecard.inference.decoding import BANNED, GOES, STOPS, Step

BROKEN = "\ufffd"  # how a decoder writes bytes that are no character (yet)
CONTEXT = 4  # settled tokens, about, that are decoded again with the next: with fewer more are decoded twice
LONGEST = 3  # tokens behind the one a character begins in; a character has four bytes at most


@dataclasses.dataclass(frozen=True)
class PartialText:
    """A growing answer: `stable` is never taken back, `open` may still change."""

    stable: str
    open: str = ""
    beams: tuple[str, ...] = ()  # all of them whole, the best first
    tokens: int = 0
    finished: str = ""  # why

    @property
    def whole(self) -> str:
        return self.stable + self.open


def grow(
    tokenizer: Any, steps: Iterable[Step], stops: list[str], before: list[int] | None = None
) -> Iterator[PartialText]:
    """A text for each step. before: tokens of the answer's beginning, when one is continued."""
    before = before or []
    window = Detokenizer(tokenizer)
    window.push(before)
    beams = _Texts(window.copy())
    read, known = 0, len(window.text)
    for step in steps:
        best = step.beams[0]
        if step.finished:
            # what is stable all beams share
            texts = [_ended(window.copy(), ids[read:], stops, known) for ids in step.beams]
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
    """The text of an answer that is to be continued, before it goes on."""
    whole = final(tokenizer, before, [])
    stable = _held_back(whole, stops).strip()
    return PartialText(stable, whole[len(stable) :], (whole,))


def final(tokenizer: Any, ids: list[int], stops: list[str], before: list[int] | None = None) -> str:
    """The whole text, up to the first stop word that does not stand in its beginning `before` already."""
    window = Detokenizer(tokenizer)
    window.push(before or [])
    return _ended(window, ids, stops, len(window.text))


def _ended(window: "Detokenizer", ids: list[int], stops: list[str], known: int) -> str:
    """The whole text with these tokens, the last ones.

    known: letters of the answer's beginning, in which no stop word counts.
    """
    window.push(ids)
    text = window.with_tail([])
    places = [text.find(stop, max(0, known + 1 - len(stop))) for stop in stops]
    found = [place for place in places if place >= 0]
    return text[: min(found)].strip() if found else text.strip()


class Detokenizer:
    """Text of a growing list of tokens; only those since the last whole character are decoded again."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.silent = {*tokenizer.all_special_ids, *(token for token, what in added.items() if what.special)}
        self.byte_tokens = _byte_tokens(tokenizer)
        self.bytes = {token: byte for byte, token in enumerate(self.byte_tokens)}
        self.text = ""
        self.context: list[int] = []  # tokens whose text is out, kept because they shape that of the next
        self.known = ""  # their text
        self.waiting: list[int] = []

    def copy(self) -> "Detokenizer":
        made = copy.copy(self)
        made.waiting = list(self.waiting)
        return made

    def push(self, ids: list[int]) -> None:
        for token in ids:
            if token in self.silent:
                continue
            self.waiting.append(token)
            new = self._new(self.waiting)
            if new and not new.endswith(BROKEN):
                self._out(new, len(self.waiting))
            elif len(self.waiting) > LONGEST:  # the oldest do not become a character any more
                self._out_oldest(new)

    def with_tail(self, ids: list[int]) -> str:
        """The text with these tokens behind it, without a broken character at its end."""
        return self.text + self.tail(ids).rstrip(BROKEN)

    def tail(self, ids: list[int]) -> str:
        """What comes behind `text` with these tokens."""
        waiting = [*self.waiting, *(token for token in ids if token not in self.silent)]
        return self._new(waiting) if waiting else ""

    def _out_oldest(self, new: str) -> None:
        """Let go of tokens that stay broken, unless a broken character goes on behind them."""
        oldest, rest = self.waiting[:-LONGEST], self.waiting[-LONGEST:]
        text = self._new(oldest)
        apart = self._decode([*oldest, *rest]) == self._decode(oldest) + new[len(text) :]
        if (text or not new) and new.startswith(text) and apart:
            self._out(text, len(oldest))

    def _out(self, text: str, count: int) -> None:
        self.text += text
        out, self.waiting = self.waiting[:count], self.waiting[count:]
        if len(self.context) < CONTEXT:
            self.context, self.known = [*self.context, *out], self.known + text
        else:
            self.context, self.known = out, self._decode(out)

    def _new(self, ids: list[int]) -> str:
        return self._decode([*self.context, *ids])[len(self.known) :]

    def _decode(self, ids: list[int]) -> str:
        ids = ids if self.bytes.keys().isdisjoint(ids) else self._mended(ids)
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _mended(self, ids: list[int]) -> list[int]:
        """The same with bytes that are no characters written as such: a decoder that meets them would take
        all bytes beside them for broken, and text that was shown with them."""
        made: list[int] = []
        for are_bytes, run in itertools.groupby(ids, self.bytes.__contains__):
            if are_bytes:
                text = bytes(self.bytes[token] for token in run).decode("utf-8", "replace")
                made += [self.byte_tokens[byte] for byte in text.encode()]
            else:
                made += run
        return made


def _byte_tokens(tokenizer: Any) -> list[int]:
    """The tokens of the 256 bytes, where a tokenizer has them for what is not in its vocabulary; else []."""
    without = (None, tokenizer.unk_token_id)
    if tokenizer.convert_tokens_to_ids("<0x00>") in without:
        return []
    found = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    return [] if any(token in without for token in found) else found


class _Texts:
    """Detokenizers of answers that grow by a token each step, each from the one it grew from."""

    def __init__(self, start: Detokenizer):
        self.start = start
        self.known: list[tuple[list[int], Detokenizer]] = []

    def of(self, ids: list[int]) -> Detokenizer:
        begun = [entry for entry in self.known if ids[: len(entry[0])] == entry[0]]
        known, window = max(begun, key=lambda entry: len(entry[0]), default=([], self.start))
        if len(known) < len(ids):
            window = window.copy()
            window.push(ids[len(known) :])
            recent = [entry for entry in self.known if len(entry[0]) >= len(ids) - 1]
            self.known = [*recent, (ids, window)]
        return window


class Watch:
    """What stop words and banned phrases say of an answer's tokens so far, of which all but one are known."""

    def __init__(self, tokenizer: Any, stops: list[str], banned: list[str], before: list[int] | None = None):
        self.stops, self.banned = stops, banned
        start = Detokenizer(tokenizer)
        start.push(before or [])
        self.texts = _Texts(start)

    def __call__(self, ids: list[int]) -> str:
        window = self.texts.of(ids[:-1])
        new = window.tail(ids[-1:]).rstrip(BROKEN)

        def completes(phrase: str) -> bool:  # what ended before was looked at before
            return phrase in window.text[max(0, len(window.text) + 1 - len(phrase)) :] + new

        if any(map(completes, self.banned)):
            return BANNED
        return STOPS if any(map(completes, self.stops)) else GOES


def watch(
    tokenizer: Any, stops: list[str], banned: list[str], before: list[int] | None = None
) -> Watch | None:
    """before: tokens of the answer's beginning, when one is continued."""
    return Watch(tokenizer, stops, banned, before) if stops or banned else None


def _held_back(text: str, stops: list[str]) -> str:
    """The text without an end that may become a stop word."""
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
