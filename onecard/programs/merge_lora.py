"""Merge a LoRA adapter into its 16-bit base model file by file, without loading the model.

python tools/merge_lora.py --lora_path lora-checkpoints/demo --output_path demo-merged
python tools/merge_lora.py --model_path MODEL --lora_path ADAPTER --output_path NEW --report
"""

from onecard.config import options as config_options
from onecard.config.conversion import MergeConfig
from onecard.errors import UserError

SETTINGS = MergeConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    if not options.lora_path or not options.output_path:
        raise UserError("--lora_path and --output_path are needed.", "See --help.")
    from onecard.conversion import merge  # imported late, because --help needs no torch
    from onecard.system import console

    with console.over_bytes("merging") as progress:
        merge.run(options, progress)
