"""Quantise a model with GPTQ, AWQ or bitsandbytes, into a folder that transformers and vLLM can load.

python tools/quantize.py --model_path demo
python tools/quantize.py --model_path MODEL --bits 3 --group_size 64 --act_order --data_path rows.json
python tools/quantize.py --model_path MODEL --method bnb --bits 8
"""

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.conversion import QuantizeConfig

SETTINGS = QuantizeConfig  # the class of its options
LESS_MEMORY = declaration.memory_savers(SETTINGS)  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.conversion import quantize  # imported late, because --help needs no torch
    from onecard.system.console import say

    folder = quantize.run(options)
    say(f"The model is in {folder}. Chat with it or train on it with --model_path {folder}")
