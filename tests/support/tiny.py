"""A tiny random Llama with a real tokenizer, as an ordinary model folder, and rows to train it on."""

import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from onecard.data import encode as data_encode
from onecard.data import examples as data_examples
from onecard.data import template as data_template
from onecard.data.conversation import Conversation

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "warm",
    "cold",
    "old",
    "new",
    "quick",
    "slow",
    "quiet",
    "loud",
    "bright",
    "dark",
    "soft",
    "hard",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, which can encode every text; its end token is <end>."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<start>", "<end>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(WORDS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<start>", eos_token="<end>")


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=300,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,  # large enough that logits differ
    )


def save_model(
    folder: Path, own: PreTrainedTokenizerFast | None = None, shard: str = "1GB", **changes
) -> Path:
    """Save the model with a tokenizer, by default the tiny one; changes: those of its configuration."""
    settings = config()
    settings.update(changes)
    torch.manual_seed(0)
    LlamaForCausalLM(settings).save_pretrained(folder, max_shard_size=shard)
    (own or tokenizer()).save_pretrained(folder)
    return folder


def rows(count: int) -> list[dict[str, str]]:
    """Different rows of different lengths; every third one has an input."""
    result = []
    for number in range(count):
        word, other = WORDS[number % len(WORDS)], WORDS[(number * 7 + 3) % len(WORDS)]
        result.append(
            {
                "instruction": f"Say {word} {number}",
                "input": other if number % 3 == 0 else "",
                "output": " ".join([word, other] * (1 + number % 5)),
            }
        )
    return result


def encoded(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerFast
) -> data_examples.Examples:
    """Conversations encoded in the alpaca template, at most 256 tokens each."""
    template = data_template.load("alpaca", tokenizer)
    folder = Path(tempfile.mkdtemp(prefix="onecard-encoded-"))
    encode = one_by_one(lambda row, _: data_encode.encode_within(row, 256, template, tokenizer))
    encoded_rows = data_examples.encode_rows(conversations, encode, folder)
    shutil.rmtree(folder)  # mapped files stay readable
    return encoded_rows.examples


def one_by_one(encode: Callable[[Conversation, int], data_examples.Encoded]) -> data_examples.Encode:
    """A function that encodes many rows with one that encodes a single row."""
    return lambda rows, numbers: [encode(row, number) for row, number in zip(rows, numbers, strict=True)]


class Screen(io.StringIO):
    """A stream that claims to be a terminal, and keeps what is written to it."""

    def isatty(self) -> bool:
        return True


def save_rows(path: Path, count: int) -> Path:
    path.write_text(json.dumps(rows(count)), encoding="utf-8")
    return path
