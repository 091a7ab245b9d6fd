"""LLaMA's tokenizer.model -> the files transformers reads. Runs in a child process.

LLaMA 1 and 2 have a SentencePiece model, LLaMA 3 a list of byte strings with their ranks (tiktoken's format).
"""

import base64
import binascii
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onecard.conversion.meta_layout import TO_HF
from onecard.errors import CHECKPOINT, UserError
from onecard.system import sandbox

NAME, ORIGINAL = "tokenizer.model", "original"
SENTENCEPIECE, RANKS = "sentencepiece", "tiktoken"
SPECIAL = 256  # tokens of LLaMA 3 behind its ranks
SPLIT = (  # LLaMA 3's, as published with its code
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
    """tokenizer.model of a model folder; beside: also next to it, where LLaMA 1 keeps it for all sizes."""
    places = [folder / NAME, folder / ORIGINAL / NAME, *([folder.parent / NAME] if beside else [])]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        problem = f"{folder}: has no {NAME}."
        raise UserError(problem, "Put the model's own there; another one's would not fit.", CHECKPOINT)
    return found


def kind(path: Path) -> str:
    """SentencePiece's, or tiktoken's lines of text."""
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
        problem = f"{path}: has {count} tokens, the embedding {vocab} rows."
        raise UserError(problem, "Put the model's own tokenizer there.", CHECKPOINT)


def write(path: Path, folder: Path, length: int | None, later: bool) -> dict[str, Any]:
    """Write the tokenizer into a folder; returns the ids of its special tokens for config.json.

    later: LLaMA 3.1 and later, which named some of the reserved tokens. Raises UserError (exit 4) when what
    was written does not give SentencePiece's own tokens.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    is_ranks = kind(path) == RANKS
    core, names = _from_ranks(path, later) if is_ranks else _from_pieces(path)
    longest = {} if length is None else {"model_max_length": length}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **names, **longest
    )
    made.save_pretrained(folder)
    place = folder / ORIGINAL if is_ranks else folder  # where the models' own repositories have them
    place.mkdir(exist_ok=True)
    shutil.copyfile(path, place / NAME)
    if not is_ranks:
        own = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        _check_same(_pieces(path), own, path)
    ids = {f"{name}_id": core.token_to_id(token) for name, token in names.items()}
    return {name: number for name, number in ids.items() if name != "unk_token_id"}


def _pieces(path: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, TypeError) as error:
        reason = str(error).replace("\n", " ")[:100]
        raise UserError(
            f"{path}: no SentencePiece model ({reason}).", "Fetch it again.", CHECKPOINT
        ) from None


def _from_pieces(path: Path) -> tuple[Any, dict[str, str]]:
    from tokenizers import normalizers, processors
    from transformers import LlamaTokenizer

    pieces = _pieces(path)
    numbers = {"unk": pieces.unk_id(), "bos": pieces.bos_id(), "eos": pieces.eos_id(), "pad": pieces.pad_id()}
    names = {f"{name}_token": pieces.id_to_piece(n) for name, n in numbers.items() if n >= 0}
    if not {"unk_token", "bos_token", "eos_token"} <= names.keys():
        raise UserError(f"{path}: has no begin, end or unknown token.", "It is no LLaMA's.", CHECKPOINT)
    try:
        with tempfile.TemporaryDirectory() as place:
            shutil.copyfile(path, Path(place) / NAME)
            core = LlamaTokenizer.from_pretrained(place, **names).backend_tokenizer
    except Exception as error:  # whatever its converter stumbles over
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:200]
        raise UserError(f"{path}: cannot be converted ({reason}).", "It is no LLaMA's.", CHECKPOINT) from None
    # SentencePiece puts its mark before every text; transformers leaves it out where there is a space already
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = None
    bos = names["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, numbers["bos"])]
    )
    return core, names


def _check_same(pieces: Any, made: Any, path: Path) -> None:
    for text in SAMPLES:
        wanted, given = pieces.encode(text), made(text, add_special_tokens=False).input_ids
        if wanted != given:
            problem = f"{path}: {text!r} would be {given} in transformers, and is {wanted}."
            raise UserError(problem, "It is not of the kind LLaMA has; it was not converted.", CHECKPOINT)


def _ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise UserError(f"{path}: damaged ({error}).", "Fetch it again.", CHECKPOINT) from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([n]) not in ranks for n in range(256)):
        raise UserError(f"{path}: damaged (ranks are missing).", "Fetch it again.", CHECKPOINT)
    return ranks


def specials(later: bool) -> list[str]:
    """LLaMA 3's special tokens in the order of their ids."""
    named = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
    if later:
        named |= {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}
    made, reserved = [], 0
    for number in range(SPECIAL):
        if number in named:
            made.append(f"<|{named[number]}|>")
        else:
            made.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return made


def _from_ranks(path: Path, later: bool) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    ranks, letters = _ranks(path), bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(one, two) for one, two in halves if one in ranks and two in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        merges += [(written[one], written[two]) for one, two in known]
    vocab = {written[token]: rank for token, rank in ranks.items()}
    # a piece that is a token is that token, whether or not merges lead to it: as tiktoken does
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
    """What the child does: the tokenizer into the new folder."""
    path, target = Path(request["tokenizer"]), Path(request["folder"])
    if request["to"] == TO_HF:
        tell(ids=write(path, target, request["length"], request["later"]))
    else:
        (target / NAME).write_bytes(path.read_bytes())
        tell(ids={})


if __name__ == "__main__":
    sandbox.serve(work)
