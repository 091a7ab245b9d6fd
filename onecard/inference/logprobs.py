"""The log-probabilities of an answer, token by token, with the text and the bytes of each token.

decoding.py says of which distribution they are. This file knows no engines and no HTTP.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from onecard.inference.decoding import Step
from onecard.inference.detokenizer import BROKEN, Detokenizer


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """One token at one place of an answer."""

    token: int
    text: str  # bytes that are no whole character are written as \xe4; of a control token its name
    content: (
        bytes | None
    )  # joined over an answer they are its text; None for a control token, which is hidden
    logprob: float  # natural logarithm, at least decoding.LEAST_LOGPROB


@dataclasses.dataclass(frozen=True)
class TokenChoice(TokenLogprob):
    """A token of an answer, and the most probable tokens at its place, the best first."""

    top: tuple[TokenLogprob, ...]


class Record:
    """Collects the log-probabilities of one answer while it is decoded."""

    def __init__(self, tokenizer: Any, stops: list[str], before: list[int]):
        """stops: the answer ends before these; before: tokens of the answer that is continued."""
        self.token_bytes = TokenBytes(tokenizer)
        self.stops = [stop.encode() for stop in stops]
        self.choices: list[TokenChoice] = []
        self.ends: list[int] = []  # of the bytes of each choice in `bytes`
        self.bytes = b"".join(self.token_bytes.of(token) or b"" for token in before)
        self.bytes_before = len(self.bytes)

    def of(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps; each is recorded before it is handed on."""
        for step in steps:
            if step.scored is not None:
                token, logprob, top = step.scored
                alternatives = tuple(TokenLogprob(*self._named(other), value) for other, value in top)
                self.choices.append(TokenChoice(*self._named(token), logprob, alternatives))
                self.bytes += self.token_bytes.of(token) or b""
                self.ends.append(len(self.bytes))
            yield step

    def settled(self, finished: str) -> tuple[TokenChoice, ...]:
        """The choices whose text stays: not those of a stop text, nor of what may become one.

        finished: why the answer ended, "" while it grows.
        """
        if not finished:
            count = bisect.bisect_right(self.ends, len(self.bytes) - self._held_back())
            return tuple(self.choices[:count])
        stop = self._stop_begins()
        starts = [self.bytes_before, *self.ends[:-1]]
        return tuple(self.choices if stop is None else self.choices[: bisect.bisect_left(starts, stop)])

    def _named(self, token: int) -> tuple[int, str, bytes | None]:
        return token, self.token_bytes.text(token), self.token_bytes.of(token)

    def _stop_begins(self) -> int | None:
        """Where the first stop text begins in `bytes`; one inside the answer before does not count."""
        places = [self.bytes.find(stop, max(0, self.bytes_before + 1 - len(stop))) for stop in self.stops]
        return min((place for place in places if place >= 0), default=None)

    def _held_back(self) -> int:
        """The length of the longest end that a stop text begins with."""
        lengths = (
            length
            for stop in self.stops
            for length in range(1, min(len(stop), len(self.bytes)) + 1)
            if self.bytes.endswith(stop[:length])
        )
        return max(lengths, default=0)


class TokenBytes:
    """Token id -> the bytes that it adds to a text, whatever stands before it."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.detokenizer = tokenizer, Detokenizer(tokenizer)
        # transformers has no types for it
        letters = bytes_to_unicode()  # type: ignore[no-untyped-call]
        self.byte_of_letter = {letter: byte for byte, letter in letters.items()}
        self.cache: dict[int, bytes | None] = {}
        self.anchor = next(filter(self._is_plain, range(len(tokenizer))), None)
        self.anchor_text = "" if self.anchor is None else self._decode([self.anchor])

    def of(self, token: int) -> bytes | None:
        """Its bytes; None for a control token, which is never shown, and for an id without a token."""
        if token not in self.cache:
            self.cache[token] = self._computed(token)
        return self.cache[token]

    def text(self, token: int) -> str:
        content = self.of(token)
        if content is None:
            return str(self.tokenizer.convert_ids_to_tokens(token) or "")
        return content.decode("utf-8", "backslashreplace")

    def _computed(self, token: int) -> bytes | None:
        if token in self.detokenizer.hidden or token >= len(self.tokenizer):
            return None
        if token in self.detokenizer.bytes:
            return bytes([self.detokenizer.bytes[token]])
        anchor = [] if self.anchor is None else [self.anchor]  # the first token of a text may lose its blank
        text = self._decode([*anchor, token])[len(self.anchor_text) :]
        letters = self.tokenizer.convert_ids_to_tokens(token) if BROKEN in text else ""
        if letters and all(letter in self.byte_of_letter for letter in letters):  # byte-level BPE
            return bytes(self.byte_of_letter[letter] for letter in letters)
        return text.encode()

    def _is_plain(self, token: int) -> bool:
        """Whether it is text that looks the same at the beginning of a text and after itself."""
        if token in self.detokenizer.hidden or token in self.detokenizer.bytes:
            return False
        text = self._decode([token])
        return bool(text.strip()) and BROKEN not in text and self._decode([token, token]) == text * 2

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
