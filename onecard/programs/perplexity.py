"""Perplexity of a model, with adapters or without, on a text file; comparable between engines.

python tools/perplexity.py text.txt --model_path demo
python tools/perplexity.py text.txt --lora_path lora-checkpoints/demo --engine llama.cpp
python tools/perplexity.py text.txt --model_path model-q4_k_m.gguf --lora_path adapter.gguf
"""

from onecard import parsing
from onecard.chat_config import PerplexityConfig

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = parsing.parse(PerplexityConfig, arguments, description=__doc__)
    from onecard import gguf, hub, measure  # after the options: --help needs no torch

    how = (hub.for_engine(options.engine), hub.fetch_adapter, gguf.for_llama)
    print(measure.describe(*measure.perplexity(options, *how, say=print)))
