"""Add characters or pieces to a tokenizer, and print how many tokens this saves.

python tools/extend_vocab.py --model_path MODEL --pieces pieces.txt --sample_text text.txt --output_path NEW

Then give the model rows for them: run prepare_base_model.py (prepare-base) with --tokenizer_path NEW.
"""

from onecard.config import conversion as config_conversion
from onecard.config import options as config_options
from onecard.errors import UserError

SETTINGS = config_conversion.VocabConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    if bool(options.pieces) == bool(options.characters):
        raise UserError("Give either --pieces or --characters.", "See --help.")
    from onecard.conversion import vocabulary  # imported late, because --help needs no torch

    vocabulary.extend_vocab(options)
