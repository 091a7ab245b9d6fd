"""The vocabulary of a base model: adds pieces to its tokenizer, and rows for them to its embedding.

Only the files that hold embeddings are rewritten, and all others are copied, so that no more than one file of
weights is in memory. Weights in other formats and sub-folders are not copied.
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

from onecard.config.conversion import PrepareConfig, VocabConfig
from onecard.conversion.side_files import REPLACED_TOKENIZER_FILES, WEIGHT_ENDINGS
from onecard.errors import CHECKPOINT, DATA, DISK, UserError
from onecard.hub import locate, model_files
from onecard.hub.model_files import INDEX
from onecard.models import base_model, tensor_files
from onecard.models import tokenizer as models_tokenizer
from onecard.system import commands, whole_folder
from onecard.system import files as system_files
from onecard.system.console import say

LONGEST_PIECE = 16  # characters; a longer line is running text by mistake


def extend_vocab(options: VocabConfig) -> None:
    """Write a tokenizer with the pieces of --pieces or the characters of --characters, and print the saving.

    Raises UserError: exit 2 for wrong options, 3 for files that cannot be used, 7 when the disk is full.
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
    say(f"on {of}: {before:.3f} -> {after:.3f} tokens per character ({fewer:.1f} % fewer)")
    with _whole(target) as place:
        tokenizer.save_pretrained(place)
    say(f"The tokenizer is in {target}. Next: {commands.name('prepare-base')} --tokenizer_path {target}")


def prepare_base_model(options: PrepareConfig) -> None:
    """Write a model that has the special tokens and an embedding row for every token, and print the numbers.

    Raises UserError as `prepare` does, and when the output folder exists already.
    """
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
        raise UserError(f"--output_path {target} is there already.", "Name a new folder.")


def _pieces(options: VocabConfig) -> list[str]:
    """The pieces to add; raises UserError (exit 3) when there are none."""
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
    """A folder to fill, which is renamed to `target` when the block ends without an error.

    Raises UserError (exit 7) when the disk refuses something.
    """
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
    """The pieces of a text file with one per line, or of a SentencePiece model.

    Of a SentencePiece model, pieces that begin a word (with its mark ▁) are left out. Raises UserError
    (exit 3) when the file cannot be used.
    """
    if not path.is_file():
        raise UserError(f"--pieces {path}: no such file.", "Name a text file or a SentencePiece model.", DATA)
    if path.suffix == ".model":
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            problem = f"--pieces {path}: no SentencePiece model ({str(error)[:100]})."
            raise UserError(problem, "Name a text file or a SentencePiece model.", DATA) from None
        numbers = range(model.get_piece_size())
        texts = [model.id_to_piece(i) for i in numbers if not (model.is_control(i) or model.is_byte(i))]
        return [piece for piece in texts if "▁" not in piece and piece != "<unk>"]
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
    """The characters outside of ASCII that a text holds at least `least` times, the most frequent first."""
    counts = Counter(c for c in text if not c.isascii() and not c.isspace())
    return [character for character, count in counts.most_common() if count >= least]


def extend(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str]) -> list[str]:
    """Add the pieces that need more than one token so far to the tokenizer; returns them."""
    vocabulary = tokenizer.get_vocab()
    added = [
        piece
        for piece in dict.fromkeys(pieces)
        if piece not in vocabulary and len(tokenizer(piece, add_special_tokens=False).input_ids) > 1
    ]
    tokenizer.add_tokens(added)
    return added


def check_spaces(old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, pieces: list[str]) -> None:
    """Raise UserError when the new tokenizer puts a space before a piece in the middle of a word.

    old, new: the tokenizer without and with the pieces.
    """
    text = "".join(f"a{piece}" for piece in pieces if " " not in piece) + "a"
    decoded = [one.decode(one(text, add_special_tokens=False).input_ids).strip() for one in (old, new)]
    if " " in decoded[1] and " " not in decoded[0]:
        problem = "This tokenizer puts a space before every added piece, in the middle of words too."
        fix = 'Write "prepend_scheme": "first" instead of "always" into its tokenizer.json.'
        raise UserError(problem, fix)


def add_special(tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
    """Add the special tokens that the tokenizer lacks; a new `<pad>` also becomes the padding token."""
    vocabulary = tokenizer.get_vocab()
    new = [token for token in tokens if token not in vocabulary]
    tokenizer.add_tokens(new, special_tokens=True)  # their ids follow this order
    if "<pad>" in new:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    others = [token for token in tokens if token != "<pad>"]  # also those that are ordinary tokens so far
    tokenizer.add_special_tokens({"extra_special_tokens": others}, replace_extra_special_tokens=False)


def tokens_per_character(tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """How many tokens the text needs, divided by its length in characters."""
    return len(tokenizer(text, add_special_tokens=False).input_ids) / max(1, len(text))


def prepare(
    source: Path,
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    target: Path,
    multiple: int,
) -> tuple[int, int, int]:
    """Write the model in `source` for the tokenizer `new`; returns (rows before, new rows, rows after).

    In the input embedding and in an untied head, the row of a token that `old` lacks is the mean of all rows
    of old's tokens. Further rows, up to a multiple of `multiple`, are zero. All other data is copied byte for
    byte. The target appears only when it is complete. Raises UserError: exit 2 when an old token has another
    id in `new`, 4 when the model is damaged or does not fit the tokenizer `old`, 7 when the disk is full.
    """
    old_ids, new_ids = old.get_vocab(), new.get_vocab()
    moved = next((token for token, number in old_ids.items() if new_ids.get(token) != number), None)
    if moved is not None:
        problem = (
            f"The new tokenizer does not extend the model's own: {moved!r} has another id, or none, in it."
        )
        raise UserError(problem, f"Extend this model's own tokenizer with {commands.name('extend-vocab')}.")
    ids, added = (
        sorted(old_ids.values()),
        sorted(set(new_ids.values()) - set(old_ids.values())),
    )
    bare = base_model.skeleton(str(source), base_model.load_config(str(source)))
    tensor_files.check_whole(source, tensor_files.of_folder(source), bare)
    names = _embedding_names(bare)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    files = _shards(source)
    tensor_names = {name for shard in files.values() for name in shard}
    missing = sorted(set(names) - tensor_names)
    if missing:
        problem = f"{source}: the tensor {missing[0]} is missing in its weights."
        raise UserError(problem, "Download the model again.", CHECKPOINT)
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
                    problem = (
                        f"{source}: its tokenizer has ids up to {max(ids)}, its embedding only {rows} rows."
                    )
                    raise UserError(problem, "Put the model's own tokenizer into the folder.", CHECKPOINT)
                tensors[name] = resized(tensors[name], ids, added, multiple)
                after = len(tensors[name])
            save_file(tensors, place / file, metadata=metadata)
        for path in source.iterdir():  # the files of the tokenizer are written below
            belongs = path.suffix not in WEIGHT_ENDINGS and not path.name.startswith(REPLACED_TOKENIZER_FILES)
            if path.is_file() and path.name not in files and belongs:
                shutil.copyfile(path, place / path.name)
        new.save_pretrained(place)
        system_files.write_json(place / "config.json", {**config, **_ids(new, config), "vocab_size": after})
        generation = place / "generation_config.json"
        if generation.is_file():
            settings = system_files.read_json(generation, "Download the model again.") or {}
            system_files.write_json(generation, {**settings, **_ids(new, settings)})
        if (source / INDEX).is_file():
            _index(source / INDEX, place, files)
    return rows, len(added), after


def resized(weight: torch.Tensor, old: list[int], new: list[int], multiple: int) -> torch.Tensor:
    """The embedding [rows, H] with the rows of the old ids, their mean for each new id, and zeros elsewhere.

    old, new: ids; the number of rows is a multiple of `multiple`, and never smaller than before.
    """
    needed = max(len(weight), *(number + 1 for number in (0, *new)))
    rows = -(-needed // multiple) * multiple
    result = weight.new_zeros(rows, weight.shape[1])
    result[old] = weight[old]
    result[new] = weight[old].float().mean(dim=0).to(weight.dtype)
    return result


def _embedding_names(bare: torch.nn.Module) -> list[str]:
    """The names of the input embedding and, unless it is tied to it, of the head."""
    weights = [bare.get_input_embeddings().weight]
    if not bare.config.tie_word_embeddings:
        weights.append(bare.get_output_embeddings().weight)
    return [name for name, p in bare.named_parameters() if any(p is weight for weight in weights)]


def _shards(source: Path) -> dict[str, list[str]]:
    """File name -> names of its tensors, for the safetensors files of a model."""
    return {path.name: list(tensor_files.of_file(path)) for path in model_files.files_of(source)}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def _ids(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> dict[str, int]:
    """The ids of the tokenizer's special tokens for a config, except where the config has a list of ids."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {
        key: value
        for key, value in ids.items()
        if value is not None and not isinstance(config.get(key), list)
    }


def _index(source: Path, folder: Path, files: dict[str, list[str]]) -> None:
    """Write the index of `source` into the folder, with the total size that its files have now."""
    index = json.loads(source.read_text(encoding="utf-8"))
    total = sum(tensor.size for file in files for tensor in tensor_files.of_file(folder / file).values())
    index.setdefault("metadata", {})["total_size"] = total
    system_files.write_json(folder / INDEX, index)
