"""A base model's vocabulary: pieces added to the tokenizer, and embedding rows that fit it.

Only the shards with embeddings are rewritten; other shards and files beside them are copied, so memory is one
shard. Weights in other formats and sub-folders are left out.
"""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from onecard.config.tools import PrepareConfig, VocabConfig
from onecard.errors import CHECKPOINT, DATA, DISK, UserError
from onecard.hub import locate, model_files
from onecard.hub.model_files import INDEX
from onecard.models import base_model, tensor_files
from onecard.models import tokenizer as models_tokenizer
from onecard.system import commands, whole_folder
from onecard.system import files as system_files
from onecard.system.console import say

TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
LONGEST_PIECE = 16  # characters; longer ones are no pieces of a vocabulary


def extend_vocab(options: VocabConfig) -> None:
    """Write a tokenizer with the pieces of --pieces or the characters of --characters, and say what it saves.

    Raises UserError.
    """
    target = Path(options.output_path)
    _check_new(target)
    pieces = _pieces(options)
    sample = text_of("--sample_text", options.sample_text) if options.sample_text else "".join(pieces)
    if not sample.strip():
        raise UserError(f"--sample_text {options.sample_text}: the file is empty.", "Name another.", DATA)
    folder = locate.locate(options.model_path)
    tokenizer = models_tokenizer.load_tokenizer(folder)
    size, before = len(tokenizer), tokens_per_character(tokenizer, sample)
    added = extend(tokenizer, pieces)
    check_spaces(models_tokenizer.load_tokenizer(folder), tokenizer, added)
    after = tokens_per_character(tokenizer, sample)
    say(f"{len(pieces)} pieces, {len(added)} added; the others are single tokens already.")
    say(f"vocabulary  {size} -> {len(tokenizer)} tokens")
    of, fewer = options.sample_text or "the pieces themselves", 100 * (1 - after / before)
    say(f"on {of}: {before:.3f} -> {after:.3f} tokens a character ({fewer:.1f} % fewer)")
    with _whole(target) as place:
        tokenizer.save_pretrained(place)
    say(f"The tokenizer is in {target}. Next: {commands.name('prepare-base')} --tokenizer_path {target}")


def prepare_base_model(options: PrepareConfig) -> None:
    """Write a model with special tokens and rows for all tokens, and say how many; raises UserError."""
    target = Path(options.output_path)
    _check_new(target)
    source = Path(locate.fetch_model(options.model_path))
    old = models_tokenizer.load_tokenizer(str(source))
    new = models_tokenizer.load_tokenizer(options.tokenizer_path or str(source))
    add_special(new, [token.strip() for token in options.add_tokens.split(",") if token.strip()])
    before, added, after = prepare(source, old, new, target, options.multiple)
    say(
        f"embedding   {before} -> {after} rows: {len(old)} tokens, {added} new ones with the mean of the old,"
    )
    say(f"            {after - len(new)} rows of zeros up to a multiple of {options.multiple}")
    say(f"The model is in {target}; train with --model_path {target}")


def _check_new(target: Path) -> None:
    if target.exists():
        raise UserError(f"--output_path {target}: is there already.", "Name a new folder.")


def _pieces(options: VocabConfig) -> list[str]:
    """What is to be added; raises UserError (exit 3) when it is nothing."""
    if options.pieces:
        pieces = pieces_of(Path(options.pieces))
        source, fix = f"--pieces {options.pieces}", "Give one piece a line."
    else:
        pieces = characters_of(text_of("--characters", options.characters), options.min_count)
        source, fix = f"--characters {options.characters}", "Lower --min_count, or give more text."
    if not pieces:
        raise UserError(f"{source}: there is nothing to add.", fix, DATA)
    return pieces


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends well; UserError (exit 7) of the disk."""
    try:
        with whole_folder.stage(target) as (place, _):
            _check_new(target)  # another program may have made it while this one waited
            yield place
            whole_folder.put(place, target)
    except OSError as error:
        problem = f"{target}: could not be written: {error.strerror or error}."
        raise UserError(problem, "Make room.", DISK) from None


def text_of(flag: str, path: str) -> str:
    """The text of a file that an option names; raises UserError (exit 3) when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{flag} {path}: cannot be read ({error})."
        raise UserError(problem, "Name a UTF-8 text file.", DATA) from None


def pieces_of(path: Path) -> list[str]:
    """Pieces from a text file, one a line, or from a SentencePiece model: its texts without the word mark."""
    if not path.is_file():
        raise UserError(f"--pieces {path}: no such file.", "Name a text file or a SentencePiece model.", DATA)
    if path.suffix == ".model":
        import sentencepiece

        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            problem = f"--pieces {path}: no SentencePiece model ({str(error)[:100]})."
            raise UserError(problem, "Name a text file or a SentencePiece model.", DATA) from None
        numbers = range(pieces.get_piece_size())
        found = [pieces.id_to_piece(i) for i in numbers if not (pieces.is_control(i) or pieces.is_byte(i))]
        return [piece for piece in found if "▁" not in piece and piece != "<unk>"]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--pieces {path}: not UTF-8 ({error}).", "Save it as UTF-8.", DATA) from None
    pieces = [line.strip() for line in lines if line.strip()]
    long = next((piece for piece in pieces if len(piece) > LONGEST_PIECE), None)
    if long:
        problem = f"--pieces {path}: a line of {len(long)} characters is no piece: {long[:40]!r}."
        raise UserError(problem, "Give one piece a line, or running text with --characters.", DATA)
    return pieces


def characters_of(text: str, least: int) -> list[str]:
    """Characters beyond ASCII that a text holds at least `least` times, most frequent first."""
    counts = Counter(c for c in text if not c.isascii() and not c.isspace())
    return [character for character, count in counts.most_common() if count >= least]


def extend(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> list[str]:
    """Add the pieces that take more than one token so far; returns those that were added."""
    known = tokenizer.get_vocab()
    new = [
        piece
        for piece in dict.fromkeys(pieces)
        if piece not in known and len(tokenizer(piece, add_special_tokens=False).input_ids) > 1
    ]
    tokenizer.add_tokens(new)
    return new


def check_spaces(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, pieces: list[str]) -> None:
    """Raise UserError when a piece inside a word comes back with a space that was not there."""
    text = "".join(f"a{piece}" for piece in pieces if " " not in piece) + "a"
    read = [one.decode(one(text, add_special_tokens=False).input_ids).strip() for one in (old, new)]
    if " " in read[1] and " " not in read[0]:
        problem = "This tokenizer puts a space before every added piece, in the middle of words too."
        fix = 'Write "prepend_scheme": "first" instead of "always" into its tokenizer.json.'
        raise UserError(problem, fix)


def add_special(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add special tokens that are not there; `<pad>` also becomes the padding token."""
    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens(new, special_tokens=True)  # their ids in the order given
    if "<pad>" in new:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    others = [token for token in tokens if token != "<pad>"]  # known ones too, which may be ordinary so far
    tokenizer.add_special_tokens({"extra_special_tokens": others}, replace_extra_special_tokens=False)


def tokens_per_character(tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    return len(tokenizer(text, add_special_tokens=False).input_ids) / max(1, len(text))


def prepare(
    source: Path,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    target: Path,
    multiple: int,
) -> tuple[int, int, int]:
    """Write the model of `source` for the tokenizer `new`; returns (rows before, new rows, rows after).

    The rows of tokens that `new` has beyond `old` are the mean of old's rows, in the input embedding and in
    an untied head; rows beyond len(new), up to a multiple, are zero. Everything else is copied byte for byte.
    The target appears when it is whole. Raises UserError.
    """
    known, wanted = old.get_vocab(), new.get_vocab()
    moved = next((token for token, number in known.items() if wanted.get(token) != number), None)
    if moved is not None:
        problem = f"The tokenizers do not belong together: {moved!r} has another id, or none, in the new one."
        raise UserError(problem, f"Extend this model's own tokenizer with {commands.name('extend-vocab')}.")
    ids, added = sorted(known.values()), sorted(set(wanted.values()) - set(known.values()))
    bare = base_model.skeleton(str(source), base_model.load_config(str(source)))
    tensor_files.check_whole(source, tensor_files.of_folder(source), bare)
    names = _embedding_names(bare)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    files = _shards(source)
    held = {name for shard in files.values() for name in shard}
    missing = sorted(set(names) - held)
    if missing:
        raise UserError(f"{source}: its weights lack {missing[0]}.", "Fetch the model again.", CHECKPOINT)
    with _whole(target) as place:
        rows = after = 0
        for file, shard in tqdm(files.items(), desc="writing shards", unit="shard", disable=None):
            if not set(names) & set(shard):
                shutil.copyfile(source / file, place / file)
                continue
            tensors, metadata = _read(source / file)
            for name in set(names) & set(shard):
                rows = len(tensors[name])
                if rows <= max(ids):
                    problem = f"{source}: its embedding has {rows} rows, its tokenizer ids up to {max(ids)}."
                    raise UserError(problem, "Model and tokenizer do not belong together.", CHECKPOINT)
                tensors[name] = resized(tensors[name], ids, added, multiple)
                after = len(tensors[name])
            save_file(tensors, place / file, metadata=metadata)
        for path in source.iterdir():  # the tokenizer's own files are written anew below
            kept = path.suffix not in WEIGHT_FILES and not path.name.startswith(TOKENIZER)
            if path.is_file() and path.name not in files and kept:
                shutil.copyfile(path, place / path.name)
        new.save_pretrained(place)
        system_files.write_json(place / "config.json", {**config, **_ids(new, config), "vocab_size": after})
        generation = place / "generation_config.json"
        if generation.is_file():
            known = json.loads(generation.read_text(encoding="utf-8"))
            system_files.write_json(generation, {**known, **_ids(new, known)})
        if (source / INDEX).is_file():
            _index(source / INDEX, place, files)
    return rows, len(added), after


def resized(weight: torch.Tensor, old: list[int], new: list[int], multiple: int) -> torch.Tensor:
    """Embedding [rows, H]: rows of the old ids kept, of the new ones their mean, all others zero."""
    needed = max(len(weight), *(number + 1 for number in (0, *new)))
    rows = -(-needed // multiple) * multiple
    made = weight.new_zeros(rows, weight.shape[1])
    made[old] = weight[old]
    made[new] = weight[old].float().mean(dim=0).to(weight.dtype)
    return made


def _embedding_names(bare: torch.nn.Module) -> list[str]:
    """Names of the input embedding and, where it is not the same tensor, of the head."""
    wanted = [bare.get_input_embeddings().weight]
    if not bare.config.tie_word_embeddings:
        wanted.append(bare.get_output_embeddings().weight)
    return [name for name, p in bare.named_parameters() if any(p is weight for weight in wanted)]


def _shards(source: Path) -> dict[str, list[str]]:
    """File -> names of its tensors, of a model in safetensors."""
    return {path.name: list(tensor_files.of_file(path)) for path in model_files.files_of(source)}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _ids(tokenizer: PreTrainedTokenizerBase, known: dict[str, Any]) -> dict[str, int]:
    """The ids of special tokens that the configuration names, or that the tokenizer alone has."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {
        key: value for key, value in ids.items() if value is not None and not isinstance(known.get(key), list)
    }


def _index(source: Path, folder: Path, files: dict[str, list[str]]) -> None:
    """The index with the size that the shards now have."""
    index = json.loads(source.read_text(encoding="utf-8"))
    total = sum(tensor.size for file in files for tensor in tensor_files.of_file(folder / file).values())
    index.setdefault("metadata", {})["total_size"] = total
    system_files.write_json(folder / INDEX, index)
