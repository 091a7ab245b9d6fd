"""Measure the perplexity of a model, with or without adapters, on a text; engines can be compared.

python tools/perplexity.py text.txt --model_path demo
python tools/perplexity.py text.txt --lora_path lora-checkpoints/demo --engine llama.cpp
python tools/perplexity.py text.txt --model_path model-q4_k_m.gguf --lora_path adapter.gguf
"""

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config.tools import PerplexityConfig

SETTINGS = PerplexityConfig  # the class of its options
LESS_MEMORY = declaration.memory_savers(SETTINGS)  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.conversion import gguf_cache  # imported late, because --help needs no torch
    from onecard.evaluation import perplexity

    print(perplexity.describe(*perplexity.perplexity(options, gguf_cache.for_llama)))
