"""Perplexity of a model, with adapters or without, in either engine, on a text file."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard import loading, scoring
from onecard.chat_config import ChatConfig, PerplexityConfig
from onecard.errors import CHECKPOINT, DATA, UserError
from onecard.scoring import Score, Text

LEAST, LEAST_CONTEXT = 2, 8  # tokens


def perplexity(options: PerplexityConfig, *how: Any, say: Callable[[str], None]) -> tuple[Score, Text, int]:
    """(score, text, tokens of a window); how: locate, fetch and to_gguf of loading.load.

    Raises UserError, exit 4 when the score is no finite number.
    """
    text = read(options.data_path)
    engine, _, mixture, _ = loading.load(for_chat(options), *how, say, exact=True)
    if len(mixture) < len(engine.adapters):
        problem = f"--lora_path names {len(engine.adapters)} adapters."
        raise UserError(problem, "Name one, or give those that act together a weight: PATH:0.5,PATH:0.5.")
    encoded = scoring.encode(engine.tokenizer, text, options.max_tokens)
    if len(encoded.ids) < LEAST:
        raise UserError(f"{options.data_path}: fewer than {LEAST} tokens.", "Name a longer text.", DATA)
    length = min(options.context, engine.context)
    if length < LEAST_CONTEXT:
        problem = f"A context of {length} tokens is too short to measure with."
        raise UserError(problem, f"Name a model that reads at least {LEAST_CONTEXT}.")
    score = scoring.score(engine, encoded, length, mixture, "scoring")
    if not math.isfinite(score.nats):
        named = options.model_path or options.lora_path or "The demo model"
        problem = f"{named}: the probability that it gives {options.data_path} is no finite number."
        fix = "Look for damaged weights in base and adapter."
        raise UserError(problem, fix, CHECKPOINT)
    return score, encoded, length


def for_chat(options: PerplexityConfig) -> ChatConfig:
    """The same options as what loads a model takes them."""
    names = {field.name for field in dataclasses.fields(ChatConfig)}
    return ChatConfig(**{name: value for name, value in vars(options).items() if name in names})


def read(path: str | None) -> str:
    """A text file; raises UserError (exit 3) when it is none."""
    if not path:
        raise UserError("No text file is named.", "Write: tools/perplexity.py FILE")
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.", "Name a text file.", DATA) from None
    except UnicodeDecodeError as error:
        problem = f"{path}: not UTF-8 at byte {error.start}."
        raise UserError(problem, "Save it as UTF-8.", DATA) from None


def describe(score: Score, text: Text, length: int) -> str:
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
