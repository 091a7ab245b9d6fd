"""The perplexity of a text: a model is loaded as for chat, and the text is scored in windows of tokens.

The same for every engine: same ids, same windows, log-softmax in fp32, sum in double precision. A window is
`length` tokens, the next one begins half a window later, and scores what no window before it has scored, so
every token is scored once and all but the first window's with half a window or more before it. A tokenizer's
own first token begins every window; without one the text's first token is not scored. encode, windows and
score know no model, only a tokenizer and an engine.
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
from onecard.data import template as templates
from onecard.errors import CHECKPOINT, DATA, UserError
from onecard.inference import loader
from onecard.inference.engine import Engine
from onecard.system import commands

LEAST, LEAST_CONTEXT = 2, 8  # tokens


class Window(NamedTuple):
    """Tokens start to end of a text, of which those from `scored` on count."""

    start: int
    end: int
    scored: int


@dataclasses.dataclass(frozen=True)
class ScoredText:
    """Token ids of a text; `ends[i]`: characters up to the end of token i."""

    ids: list[int]
    ends: list[int]
    text: str
    beginning: list[int]  # the tokenizer's own first token, or nothing

    @property
    def unscored(self) -> int:
        return 0 if self.beginning else 1

    @property
    def fingerprint(self) -> str:
        """Of the ids: equal for two engines that saw the same tokens."""
        return hashlib.sha256(np.array(self.ids, dtype=np.int64).tobytes()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Score:
    """Minus the sum of log-probabilities (nats) of so many tokens, characters and UTF-8 bytes."""

    nats: float
    tokens: int
    characters: int
    bytes: int

    @property
    def perplexity(self) -> float:
        """Per token (Jelinek et al. 1977); comparable between models of one tokenizer only."""
        return math.exp(min(self.nats / self.tokens, 700))

    def per(self, count: int) -> float:
        return math.exp(min(self.nats / count, 700))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def encode(tokenizer: PreTrainedTokenizerBase, text: str, most: int | None = None) -> ScoredText:
    """The first `most` tokens of a text; control tokens written in it are text."""
    made = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids, ends = list(made.input_ids), [end for _, end in made.offset_mapping]
    own = tokenizer("a").input_ids[:1]
    beginning = own if own == [tokenizer.bos_token_id] else []
    return ScoredText(ids[:most], ends[:most], text, beginning)


def windows(count: int, length: int, unscored: int = 1) -> list[Window]:
    """Windows over `count` tokens; unscored: how many of the first ones are not scored."""
    assert length > 1  # or the next window would begin where this one does
    made = [Window(0, min(length, count), unscored)]
    while made[-1].end < count:
        start = made[-1].start + length // 2
        made.append(Window(start, min(start + length, count), made[-1].end))
    return made


def score(
    engine: Engine, text: ScoredText, length: int, active_adapters: ActiveAdapters = (), title: str = ""
) -> Score:
    """Score a text in windows of `length` tokens; title: of the bar, none without."""
    nats = 0.0
    cut = windows(len(text.ids), length - len(text.beginning), text.unscored)
    tokens = len(text.ids) - text.unscored
    with tqdm(total=tokens, desc=title, unit=" tokens", disable=None if title else True) as bar:
        for window in cut:
            ids = text.beginning + text.ids[window.start : window.end]
            skip = window.scored - window.start + len(text.beginning)
            nats += sum(_log_probabilities(engine.each(ids, active_adapters), ids, skip))
            bar.update(window.end - window.scored)
    left_out = text.ends[text.unscored - 1] if text.unscored else 0
    scored = text.text[left_out : text.ends[-1]]
    return Score(-nats, tokens, max(len(scored), 1), max(len(scored.encode()), 1))


def _log_probabilities(logits: Iterator[torch.Tensor], ids: list[int], skip: int) -> Iterator[float]:
    """Sums over some tokens at a time, those before `skip` left out."""
    start = 1  # the first logits are of the second token
    for rows in logits:
        first, last = max(start, skip), min(start + len(rows), len(ids))
        if first < last:
            chosen = torch.log_softmax(rows[first - start : last - start].float(), -1)
            wanted = torch.tensor(ids[first:last], device=chosen.device)[:, None]
            yield chosen.gather(1, wanted).double().sum().item()
        start += len(rows)


def perplexity(options: PerplexityConfig, to_gguf: loader.ToGguf) -> tuple[Score, ScoredText, int]:
    """(score, text, tokens of a window); to_gguf: as loader.load takes it.

    Raises UserError, exit 4 when the score is no finite number.
    """
    text = read(options.data_path)
    engine, tokenizer, template, active_adapters, _ = loader.load(for_chat(options), to_gguf, exact=True)
    tokenizer = templates.tokenizer_for(tokenizer, template)
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
    found = score(engine, encoded, length, active_adapters, "scoring")
    if not math.isfinite(found.nats):
        named = options.model_path or options.lora_path or "The demo model"
        problem = f"{named}: the probability that it gives {options.data_path} is no finite number."
        fix = "Look for damaged weights in base and adapter."
        raise UserError(problem, fix, CHECKPOINT)
    return found, encoded, length


def for_chat(options: PerplexityConfig) -> ChatConfig:
    """The same options as what loads a model takes them."""
    names = {field.name for field in dataclasses.fields(ChatConfig)}
    return ChatConfig(**{name: value for name, value in vars(options).items() if name in names})


def read(path: str | None) -> str:
    """A text file; raises UserError (exit 3) when it is none."""
    if not path:
        raise UserError("No text file is named.", f"Write: {commands.name('perplexity')} FILE")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", "Name a text file.", DATA) from None
    except UnicodeDecodeError as error:
        problem = f"{path}: not UTF-8 at byte {error.start}."
        raise UserError(problem, "Save it as UTF-8.", DATA) from None


def describe(score: Score, text: ScoredText, length: int) -> str:
    """What was scored, how, and the results."""
    first = (
        "each window begins with the tokenizer's first token" if text.beginning else "all but the first token"
    )
    return "\n".join(
        [
            f"scored      {score.tokens:,} tokens, {score.characters:,} characters, {score.bytes:,} bytes "
            f"(ids {text.fingerprint})",
            f"windows     of {length} tokens, every {length // 2}; every token once; {first}",
            f"log-prob    {-score.nats:.4f} nats",
            f"perplexity  {score.perplexity:.4f} per token, {score.per(score.characters):.4f} per character, "
            f"{score.per(score.bytes):.4f} per byte ({score.bits_per_byte:.4f} bits)",
        ]
    )
