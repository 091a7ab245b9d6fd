"""Convert a LLaMA model to the layout of transformers, back, or to another number of files.

python tools/convert_llama.py --input_dir LLAMA/7B --output_dir llama-7b-hf
python tools/convert_llama.py --input_dir llama-7b-hf --output_dir llama-7b --to meta --num_shards 2
python tools/convert_llama.py --input_dir LLAMA/13B --output_dir llama-13b --to meta --num_shards 1
"""

from onecard.config import options as config_options
from onecard.config.conversion import ConvertConfig
from onecard.errors import UserError

SETTINGS = ConvertConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    if not options.input_dir or not options.output_dir:
        raise UserError("--input_dir and --output_dir are needed.", "See --help.")
    from onecard.conversion import meta_llama  # imported late, because --help needs no package
    from onecard.system import console

    with console.over_bytes("converting") as progress:
        meta_llama.run(options, progress)
