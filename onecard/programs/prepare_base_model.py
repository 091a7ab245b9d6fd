"""Add special tokens to a base model, and an embedding row for every token of its tokenizer.

python tools/prepare_base_model.py --model_path MODEL --output_path NEW
python tools/prepare_base_model.py --model_path MODEL --tokenizer_path EXTENDED --output_path NEW
"""

from onecard.config import conversion as config_conversion
from onecard.config import options as config_options

SETTINGS = config_conversion.PrepareConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.conversion import vocabulary  # imported late, because --help needs no torch

    vocabulary.prepare_base_model(options)
