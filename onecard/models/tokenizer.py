"""Loads the tokenizer of a model folder, and compares it with the embedding of the model."""

from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from onecard.errors import UserError
from onecard.hub.remote_code import TrustedCode
from onecard.models.load_errors import NOT_A_MODEL, cannot_load
from onecard.system import commands

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_EXTRAS = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


def load_tokenizer(path: str, code: TrustedCode | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model.

    code: the user's consent to run Python code of the model; without it, a model that needs its own code is
    refused (exit 8). Raises UserError when there is no tokenizer or when it has no end token.
    """
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{path}: the folder has no tokenizer.",
            f"It needs one of: {', '.join(TOKENIZER_FILES)}.",
        )
    try:
        if code:
            tokenizer = code.read(AutoTokenizer)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except NOT_A_MODEL as error:
        raise cannot_load(path, "its tokenizer", error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no end token.", "Set eos_token in tokenizer_config.json.")
    return tokenizer


def check_vocabulary(
    path: str, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray
) -> str:
    """A warning about the tokenizer, or "".

    ids: the token ids of all rows. Raises UserError when the embedding of the model has no row for one of
    them.
    """
    config = config.get_text_config()
    rows = config.vocab_size
    if max(tokenizer.get_vocab().values()) >= rows and ids.max() >= rows:
        problem = f"--model_path {path}: the rows have token ids up to {ids.max()}, its embedding {rows}."
        raise UserError(problem, f"Use {commands.name('prepare-base')}, or the tokenizer that belongs to it.")
    named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if named != [None] and tokenizer.eos_token_id not in named:
        return f"the end token of the tokenizer is {tokenizer.eos_token_id}, but config.json says {named}"
    return ""
