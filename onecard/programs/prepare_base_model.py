"""Give a base model special tokens and an embedding whose rows fit its tokenizer.

python tools/prepare_base_model.py --model_path MODEL --output_path NEW
python tools/prepare_base_model.py --model_path MODEL --tokenizer_path EXTENDED --output_path NEW
"""

from pathlib import Path

from onecard.config import options as config_options
from onecard.config import tools as tool_config
from onecard.errors import UserError

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(tool_config.PrepareConfig, arguments, description=__doc__)
    target = Path(options.output_path)
    if target.exists():
        raise UserError(f"--output_path {target}: is there already.", "Name a new folder.")
    from onecard.conversion import vocabulary
    from onecard.hub import locate
    from onecard.models import (
        tokenizer as models_tokenizer,  # after the options, so that --help needs no torch
    )

    source = Path(locate.fetch_model(options.model_path))
    old = models_tokenizer.load_tokenizer(str(source))
    new = models_tokenizer.load_tokenizer(options.tokenizer_path or str(source))
    vocabulary.add_special(new, [token.strip() for token in options.add_tokens.split(",") if token.strip()])
    before, added, after = vocabulary.prepare(source, old, new, target, options.multiple)
    print(
        f"embedding   {before} -> {after} rows: {len(old)} tokens, {added} new ones with the mean of the old,"
    )
    print(f"            {after - len(new)} rows of zeros up to a multiple of {options.multiple}")
    print(f"The model is in {target}; train with --model_path {target}")
