"""The perplexity of a text: a model is loaded as for chat, and the text is scored in windows of tokens.

It is computed in the same way for every engine: same ids, same windows, same likelihood.py. A window has
`length` tokens, and the next one begins half a window later and scores only tokens that no earlier window has
scored. So every token is scored once, and outside of the first window each has at least half a window of
context. When the tokenizer begins a text with a BOS token, every window begins with it; otherwise the first
token of the text is not scored. The functions encode, windows and score know no model, only a tokenizer and
an engine.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from onecard.config.chat import ChatConfig
from onecard.config.generation import ActiveAdapters
from onecard.config.tools import PerplexityConfig
from onecard.data import template as data_template
from onecard.errors import CHECKPOINT, DATA, UserError
from onecard.evaluation import likelihood
from onecard.inference import loader
from onecard.inference.engine import Engine
from onecard.system import commands

LEAST, LEAST_CONTEXT = 2, 8  # tokens of the shortest text and of the shortest window


class Window(NamedTuple):
    """The tokens start..end (exclusive) of a text; those from `scored` on are scored."""

    start: int
    end: int
    scored: int


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """A text and its token ids; ends[i] is the number of characters up to the end of token i."""

    ids: list[int]
    ends: list[int]
    text: str
    bos_ids: list[int]  # the BOS token with which the tokenizer begins a text, or nothing

    @property
    def unscored(self) -> int:
        """How many tokens at the beginning of the text are not scored: 0 or 1."""
        return 0 if self.bos_ids else 1

    @property
    def fingerprint(self) -> str:
        """A hash of the ids, which is equal for two engines that scored the same tokens."""
        return hashlib.sha256(np.array(self.ids, dtype=np.int64).tobytes()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Score:
    """Minus the log-probability (nats) of a text, and its length in tokens, characters and UTF-8 bytes."""

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Perplexity per token. Only models with the same tokenizer can be compared by it."""
        return self.per(self.tokens)

    def per(self, count: int) -> float:
        """Perplexity per token, character or byte, whichever `count` is a number of."""
        return likelihood.perplexity(self.nats, count)

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte, which compares models with different tokenizers."""
        return self.nats / math.log(2) / self.bytes


def encode(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None = None) -> ScoredText:
    """The first `most` tokens of a text, or all. A special token that is spelled out in it counts as text."""
    encoding = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    ids, ends = list(encoding.input_ids), [end for _, end in encoding.offset_mapping]
    first_ids = tokenizer("a").input_ids[:1]
    bos_ids = first_ids if first_ids == [tokenizer.bos_token_id] else []
    return ScoredText(ids[:most], ends[:most], text, bos_ids)


def windows(count: int, length: int, unscored: int = 1) -> list[Window]:
    """Windows of at most `length` tokens over `count` tokens; the first `unscored` tokens are not scored."""
    assert length > 1  # otherwise the next window would begin at the same token
    spans = [Window(0, min(length, count), unscored)]
    while spans[-1].end < count:
        start = spans[-1].start + length // 2
        spans.append(Window(start, min(start + length, count), spans[-1].end))
    return spans


def score(
    engine: Engine, text: ScoredText, length: int, active_adapters: ActiveAdapters = (), title: str = ""
) -> Score:
    """Score a text in windows of `length` tokens.

    active_adapters: those of the engine; title: of the progress bar, without which there is none.
    """
    nats = 0.0
    spans = windows(len(text.ids), length - len(text.bos_ids), text.unscored)
    tokens = len(text.ids) - text.unscored
    with tqdm(total=tokens, desc=title, unit=" tokens", disable=None if title else True) as bar:
        for window in spans:
            ids = text.bos_ids + text.ids[window.start : window.end]
            skip = window.scored - window.start + len(text.bos_ids)
            nats += sum(_log_probabilities(engine.each(ids, active_adapters), ids, skip))
            bar.update(window.end - window.scored)
    left_out = text.ends[text.unscored - 1] if text.unscored else 0
    scored = text.text[left_out : text.ends[-1]]
    return Score(-nats, tokens, max(len(scored), 1), max(len(scored.encode()), 1))


def _log_probabilities(logits: Iterator[torch.Tensor], ids: list[int], skip: int) -> Iterator[float]:
    """Sums of log-probabilities over a few tokens at a time; the first `skip` tokens are left out."""
    start = 1  # the first logits predict the second token
    for rows in logits:
        first, last = max(start, skip), min(start + len(rows), len(ids))
        if first < last:
            tokens = torch.tensor(ids[first:last])
            yield likelihood.log_probability(rows[first - start : last - start], tokens)
        start += len(rows)


def perplexity(options: PerplexityConfig, to_gguf: loader.ToGguf) -> tuple[Score, ScoredText, int]:
    """(score, text, tokens of a window) of the text and the model that the options name.

    to_gguf: as loader.load takes it. Raises UserError: exit 2 and 3 for wrong options and texts, 4 when the
    score is not finite, and as loader.load does.
    """
    text = read(options.data_path)
    engine, tokenizer, template, active_adapters, _ = loader.load(for_chat(options), to_gguf, exact=True)
    tokenizer = data_template.tokenizer_for(tokenizer, template)
    if len(active_adapters) < len(engine.adapters):
        problem = f"--lora_path names {len(engine.adapters)} adapters."
        raise UserError(problem, "Name one, or give those that act together a weight: PATH:0.5,PATH:0.5.")
    encoded = encode(tokenizer, text, options.max_tokens)
    if len(encoded.ids) < LEAST:
        raise UserError(f"{options.data_path}: fewer than {LEAST} tokens.", "Name a longer text.", DATA)
    length = min(options.context, engine.context)
    if length < LEAST_CONTEXT:
        problem = f"A context of {length} tokens is too short to measure with."
        raise UserError(problem, f"Name a model that reads at least {LEAST_CONTEXT}.")
    score_of_text = score(engine, encoded, length, active_adapters, "scoring")
    if not math.isfinite(score_of_text.nats):
        model = options.model_path or options.lora_path or "The demo model"
        problem = f"{model}: the probability that it gives {options.data_path} is no finite number."
        fix = "Look for damaged weights in base and adapter."
        raise UserError(problem, fix, CHECKPOINT)
    return score_of_text, encoded, length


def for_chat(options: PerplexityConfig) -> ChatConfig:
    """The options in the form that loader.load takes."""
    names = {field.name for field in dataclasses.fields(ChatConfig)}
    return ChatConfig(**{name: value for name, value in vars(options).items() if name in names})


def read(path: str | None) -> str:
    """The content of a text file; raises UserError (exit 3) when it cannot be read as UTF-8."""
    if not path:
        raise UserError("No text file is named.", f"Write: {commands.name('perplexity')} FILE")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        problem = f"{path}: the file cannot be read ({error.strerror})."
        raise UserError(problem, "Name a text file.", DATA) from None
    except UnicodeDecodeError as error:
        problem = f"{path} is not UTF-8 at byte {error.start}."
        raise UserError(problem, "Save the file as UTF-8.", DATA) from None


def describe(score: Score, text: ScoredText, length: int) -> str:
    """Lines of text: what was scored, how, and the results."""
    first = "each window begins with the BOS token" if text.bos_ids else "the first token is not scored"
    return "\n".join(
        [
            f"scored      {score.tokens:,} tokens, {score.characters:,} characters, {score.bytes:,} bytes "
            f"(ids {text.fingerprint})",
            f"windows     of {length} tokens, every {length // 2}; each token is scored once; {first}",
            f"log-prob    {-score.nats:.4f} nats",
            f"perplexity  {score.perplexity:.4f} per token, {score.per(score.characters):.4f} per character, "
            f"{score.per(score.bytes):.4f} per byte ({score.bits_per_byte:.4f} bits)",
        ]
    )
