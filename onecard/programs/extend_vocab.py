"""Add characters or pieces to a tokenizer, and say what that saves.

python tools/extend_vocab.py --model_path MODEL --pieces pieces.txt --sample_text text.txt --output_path NEW
Afterwards the model needs rows for them: tools/prepare_base_model.py --tokenizer_path NEW
"""

import tempfile
from pathlib import Path

from onecard.config import options as config_options
from onecard.config import tools as tool_config
from onecard.errors import DATA, UserError

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(tool_config.VocabConfig, arguments, description=__doc__)
    target = Path(options.output_path)
    if bool(options.pieces) == bool(options.characters):
        raise UserError("Give either --pieces or --characters.", "See --help.")
    if target.exists():
        raise UserError(f"--output_path {target}: is there already.", "Name a new folder.")
    from onecard.conversion import vocabulary
    from onecard.hub import locate
    from onecard.models import (
        tokenizer as models_tokenizer,  # after the options, so that --help needs no torch
    )

    wanted = (
        vocabulary.pieces_of(Path(options.pieces))
        if options.pieces
        else vocabulary.characters_of(text_of("--characters", options.characters), options.min_count)
    )
    if not wanted:
        source = f"--pieces {options.pieces}" if options.pieces else f"--characters {options.characters}"
        fix = "Give one piece a line." if options.pieces else "Lower --min_count, or give more text."
        raise UserError(f"{source}: there is nothing to add.", fix, DATA)
    sample = text_of("--sample_text", options.sample_text) if options.sample_text else "".join(wanted)
    if not sample.strip():
        raise UserError(f"--sample_text {options.sample_text}: the file is empty.", "Name another.", DATA)
    tokenizer = models_tokenizer.load_tokenizer(locate.locate(options.model_path))
    size, before = len(tokenizer), vocabulary.tokens_per_character(tokenizer, sample)
    added = vocabulary.extend(tokenizer, wanted)
    vocabulary.check_spaces(
        models_tokenizer.load_tokenizer(locate.locate(options.model_path)), tokenizer, added
    )
    after = vocabulary.tokens_per_character(tokenizer, sample)
    print(f"{len(wanted)} pieces, {len(added)} added; the others are single tokens already.")
    print(f"vocabulary  {size} -> {len(tokenizer)} tokens")
    of = options.sample_text or "the pieces themselves"
    print(
        f"on {of}: {before:.3f} -> {after:.3f} tokens a character ({100 * (1 - after / before):.1f} % fewer)"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        made = Path(temporary) / "made"
        tokenizer.save_pretrained(made)
        made.rename(target)
    print(f"The tokenizer is in {target}. Next: tools/prepare_base_model.py --tokenizer_path {target}")


def text_of(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{flag} {path}: cannot be read ({error}).", "Name a UTF-8 text file.", DATA
        ) from None
