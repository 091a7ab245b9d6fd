"""Converts LLaMA's tokenizer.model into the files that transformers reads. It runs in a child process.

The tokenizer of LLaMA 1 and 2 is a SentencePiece model; that of LLaMA 3 is a list of byte strings with their
ranks, in the format of tiktoken.
"""

import base64
import binascii
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.config.conversion import TO_HF
from onecard.errors import CHECKPOINT, UserError
from onecard.system import sandbox

NAME, ORIGINAL = "tokenizer.model", "original"
SENTENCEPIECE, RANKS = "sentencepiece", "tiktoken"
SPECIAL = 256  # number of special tokens of LLaMA 3, whose ids follow the ranks
SPLIT = (  # how LLaMA 3 splits a text into words, as published with its code
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLES = (
    "Below is an instruction that describes a task.",
    "  two spaces,\ta tab\nand\n\n\nlines  ",
    "1234567890 + 3.14 = 50%; f(x) -> {'a': [1, 2]}",
    "请用一句话介绍你自己。机器学习，深度学习！",
    "naïve café Привет שלום 日本語 🙂👩‍🚀",
    "word",
    " ",
)


def find(folder: Path, beside: bool) -> Path:
    """The path of tokenizer.model for a model folder.

    beside: look next to the folder too, where LLaMA 1 has one file for all sizes. Raises UserError (exit 4)
    when there is none.
    """
    candidates = [folder / NAME, folder / ORIGINAL / NAME, *([folder.parent / NAME] if beside else [])]
    path = next((place for place in candidates if place.is_file()), None)
    if path is None:
        problem = f"{folder}: the folder has no {NAME}."
        raise UserError(problem, f"Put the {NAME} of this model into the folder.", CHECKPOINT)
    return path


def kind(path: Path) -> str:
    """The format of the file, SENTENCEPIECE or RANKS."""
    with open(path, "rb") as file:
        fields = file.readline(1 << 12).split()
    try:
        is_ranks = (
            len(fields) == 2 and fields[1].isdigit() and bool(base64.b64decode(fields[0], validate=True))
        )
    except binascii.Error:
        is_ranks = False
    return RANKS if is_ranks else SENTENCEPIECE


def check_size(path: Path, vocab: int) -> None:
    """Raise UserError (exit 4) unless the tokenizer has as many tokens as the embedding has rows."""
    count = len(_ranks(path)) + SPECIAL if kind(path) == RANKS else _pieces(path).get_piece_size()
    if count != vocab:
        problem = f"{path}: the tokenizer has {count} tokens, but the embedding has {vocab} rows."
        raise UserError(problem, "Replace it by the tokenizer of this model.", CHECKPOINT)


def write(path: Path, folder: Path, length: int | None, later: bool) -> dict[str, Any]:
    """Write the tokenizer into a folder; returns the ids of its special tokens for config.json.

    length: tokens of the longest context, None when it is not known; later: the model is LLaMA 3.1 or later,
    where some of the reserved tokens have names. Raises UserError (exit 4) when the file is damaged, or when
    the written tokenizer gives other tokens than SentencePiece.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_ranks = kind(path) == RANKS
    core, names = _from_ranks(path, later) if is_ranks else _from_pieces(path)
    longest = {} if length is None else {"model_max_length": length}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **names, **longest
    )
    tokenizer.save_pretrained(folder)
    original_folder = folder / ORIGINAL if is_ranks else folder  # as in the models' repositories
    original_folder.mkdir(exist_ok=True)
    shutil.copyfile(path, original_folder / NAME)
    if not is_ranks:
        written = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        _check_same(_pieces(path), written, path)
    ids = {f"{name}_id": core.token_to_id(token) for name, token in names.items()}
    return {name: number for name, number in ids.items() if name != "unk_token_id"}


def _pieces(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError) as error:
        reason = str(error).replace("\n", " ")[:100]
        problem = f"{path} is no SentencePiece model ({reason})."
        raise UserError(problem, "Download it again.", CHECKPOINT) from None


def _from_pieces(path: Path) -> tuple[Any, dict[str, str]]:
    from tokenizers import normalizers, processors
    from transformers import LlamaTokenizer

    pieces = _pieces(path)
    numbers = {"unk": pieces.unk_id(), "bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
    names = {f"{name}_token": pieces.id_to_piece(n) for name, n in numbers.items() if n >= 0}
    if not {"unk_token", "bos_token", "eos_token"} <= names.keys():
        problem = f"{path}: the tokenizer has no BOS, EOS or unknown token, so it is not one of LLaMA."
        raise UserError(problem, "Replace it by the tokenizer of this model.", CHECKPOINT)
    try:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / NAME)
            core = LlamaTokenizer.from_pretrained(folder, **names).backend_tokenizer
    except Exception as error:  # its converter may raise anything for a file of another kind
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        problem = f"{path} cannot be converted, so it is not a tokenizer of LLaMA ({reason})."
        raise UserError(problem, "Replace it by the tokenizer of this model.", CHECKPOINT) from None
    # SentencePiece puts its mark before every text, transformers only before texts without a space in front
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    bos = names["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, numbers["bos"])]
    )
    return core, names


def _check_same(pieces: Any, tokenizer: Any, path: Path) -> None:
    for text in SAMPLES:
        expected, actual = pieces.encode(text), tokenizer(text, add_special_tokens=False).input_ids
        if expected != actual:
            ids = f"SentencePiece encodes {text!r} as {expected}, transformers would encode it as {actual}"
            problem = f"{path} was not converted, because it is no tokenizer of LLaMA's kind: {ids}."
            raise UserError(problem, "Replace it by the tokenizer of this model.", CHECKPOINT)


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path} is damaged ({error}).", "Download it again.", CHECKPOINT) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([n]) not in ranks for n in range(256)):
        raise UserError(f"{path} is damaged (ranks are missing).", "Download it again.", CHECKPOINT)
    return ranks


def specials(later: bool) -> list[str]:
    """The special tokens of LLaMA 3 in the order of their ids; later: as in `write`."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    if later:
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    names, reserved = [], 0
    for number in range(SPECIAL):
        if number in named:
            names.append(f"<|{named[number]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def _from_ranks(path: Path, later: bool) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks, letters = _ranks(path), bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        mergeable = [(one, two) for one, two in halves if one in ranks and two in ranks]
        mergeable.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written[one], written[two]) for one, two in mergeable]
    vocab = {written[token]: rank for token, rank in ranks.items()}
    # like tiktoken, a piece that is a token becomes this token even if no merges lead to it
    core = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    names = specials(later)
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    bos, eos = names[:2]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, core.token_to_id(bos))],
    )
    return core, {"bos_token": bos, "eos_token": eos}


def work(request: dict[str, Any], tell: Callable[..., None]) -> None:
    """The work of the child process: write the tokenizer into the new folder, and report its ids."""
    path, target = Path(request["tokenizer"]), Path(request["folder"])
    if request["to"] == TO_HF:
        tell(ids=write(path, target, request["length"], request["later"]))
    else:
        (target / NAME).write_bytes(path.read_bytes())
        tell(ids={})


if __name__ == "__main__":
    sandbox.serve(work)
