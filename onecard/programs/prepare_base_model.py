"""Give a base model special tokens and an embedding whose rows fit its tokenizer.

python tools/prepare_base_model.py --model_path MODEL --output_path NEW
python tools/prepare_base_model.py --model_path MODEL --tokenizer_path EXTENDED --output_path NEW
"""

from onecard.config import options as config_options
from onecard.config import tools as tool_config

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(tool_config.PrepareConfig, arguments, description=__doc__)
    from onecard.conversion import vocabulary  # after the options, so that --help needs no torch

    vocabulary.prepare_base_model(options)
