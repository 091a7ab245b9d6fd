"""Answers that are JSON of a schema: which tokens may come next, from the tokenizer at hand.

llguidance, a package of the set-up part serve, reads the schema and computes the tokens that may come next.
This file knows no engines: a grammar only changes scores.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from onecard.errors import UserError
from onecard.inference.logprobs import TokenBytes
from onecard.system import commands

if TYPE_CHECKING:
    import llguidance

JSON_OBJECT: Mapping[str, Any] = {"type": "object"}  # the schema of any JSON object
LONGEST_SCHEMA = 100_000  # characters; OpenAI's API takes schemas of about this length
WRITTEN_BYTES = (*range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1))  # ASCII, and parts of UTF-8
# between two parts of the JSON, once: where blanks have no end, weak models write nothing else
BLANKS = r"( |\n {0,32})"


class Vocabulary:
    """A tokenizer as llguidance reads it; making one takes 1 s for 49,152 tokens, so callers keep it."""

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]):
        """Raise UserError when llguidance is not installed or cannot take this tokenizer."""
        commands.require("llguidance", "serve")
        import llguidance

        source = _Source(tokenizer, eos_ids)
        if not all(bytes([byte]) in source.token_of for byte in WRITTEN_BYTES):
            raise UserError("JSON of a schema needs another tokenizer: this cannot write every character.")
        self.hidden, self.eos_ids = set(source.special_token_ids), list(eos_ids)
        try:
            wrapper = llguidance.TokenizerWrapper(source)
            self.tokens = llguidance.LLTokenizer(wrapper, eos_token=self.eos_ids)
        except (ValueError, RuntimeError) as error:
            problem = f"JSON of a schema needs another tokenizer: {_in_one_line(str(error))}"
            raise UserError(problem) from None

    def grammar(self, schema: Mapping[str, Any], before: Sequence[int] = ()) -> "Grammar":
        """The rule for an answer that is JSON of this schema.

        before: the tokens that the answer begins with, when an earlier answer is continued. Raises UserError
        for a schema that is wrong or cannot be followed, and for an earlier answer that does not begin so.
        """
        import llguidance

        text = _as_text(schema)
        source = llguidance.LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": BLANKS})
        limits = llguidance.LLParserLimits(verbose_errors=False)  # no state of the parser in the messages
        matcher = llguidance.LLMatcher(self.tokens, source, log_level=0, limits=limits)
        matcher.compute_bitmask()  # some schemas fail only here
        if matcher.is_error():
            raise UserError(f"The JSON schema cannot be followed: {_in_one_line(matcher.get_error())}")
        shown = [token for token in before if token not in self.hidden]
        if matcher.validate_tokens(shown) < len(shown):
            raise UserError("The answer that is to be continued is no beginning of JSON of this schema.")
        matcher.consume_tokens(shown)
        return Grammar(matcher, self.eos_ids, self.hidden)


class _Source:
    """What llguidance.TokenizerWrapper asks of a tokenizer.

    llguidance.hf reads a tokenizer by itself, but takes the sign for blanks of some for text. These bytes are
    those that a reader will see, for every tokenizer.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int]):
        token_bytes = TokenBytes(tokenizer)
        contents = [token_bytes.of(token) for token in range(len(tokenizer))]
        self.tokenizer, self.eos_token_id, self.bos_token_id = tokenizer, eos_ids[0], None
        self.tokens = [content or b"" for content in contents]
        self.special_token_ids = [token for token, content in enumerate(contents) if content is None]
        self.token_of = {content: token for token, content in reversed(list(enumerate(contents))) if content}
        self.longest = max(map(len, self.token_of), default=0)

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that must come next: those of the tokenizer, or the longest ones that fit."""
        if not isinstance(text, str):
            raise TypeError("llguidance asks with a text when bytes are refused")
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        content = text.encode()
        if b"".join(self.tokens[token] for token in ids) == content:
            return ids
        ids = []  # the tokenizer adds a blank, say
        while content:
            fits = (self.token_of.get(content[:length]) for length in range(self.longest, 0, -1))
            token = next((token for token in fits if token is not None), None)
            if token is None:
                break
            ids.append(token)
            content = content[len(self.tokens[token]) :]
        return ids


class Grammar:
    """A rule of rules.AnswerRule for one answer: what the schema does not allow next becomes impossible.

    An EOS id is possible only where the JSON may end. A step raises UserError when the schema turns out to be
    too complex for the answer so far.
    """

    def __init__(self, matcher: "llguidance.LLMatcher", eos_ids: Sequence[int], hidden: set[int]):
        self.matcher, self.eos_ids, self.hidden = matcher, eos_ids, hidden
        self.read = 0  # tokens of the answer

    def __call__(self, answer: list[int], scores: torch.Tensor) -> torch.Tensor:
        self.matcher.consume_tokens(answer[self.read :])
        self.read = len(answer)
        forbidden = torch.from_numpy(~self._allowed(scores.shape[-1]))
        return scores.masked_fill(forbidden.to(scores.device), -torch.inf)

    def _allowed(self, count: int) -> npt.NDArray[np.bool_]:
        """For each of the first `count` token ids, whether it may come next."""
        allowed = np.zeros(count, dtype=bool)
        if not self.matcher.is_stopped():
            packed = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
            bits = np.unpackbits(packed, count=min(count, 8 * len(packed)), bitorder="little")
            allowed[: len(bits)] = bits
        if self.matcher.is_error():
            problem = _in_one_line(self.matcher.get_error())
            raise UserError(f"The JSON schema cannot be followed any further: {problem}")
        eos_ids = [token for token in self.eos_ids if token < count]
        allowed[[token for token in self.hidden if token < count] + eos_ids] = False
        ends = self.matcher.is_accepting()
        if not (ends or allowed.any()):
            raise UserError("The JSON schema asks for a text for which the model has no tokens.")
        allowed[eos_ids] = ends
        return allowed


def _as_text(schema: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"The JSON schema cannot be read: {_in_one_line(str(error))}") from None
    if len(text) > LONGEST_SCHEMA:
        raise UserError(f"The JSON schema has {len(text)} characters. It may have {LONGEST_SCHEMA} at most.")
    return text


def _in_one_line(text: str, most: int = 300) -> str:
    return " ".join(text.split())[:most]
