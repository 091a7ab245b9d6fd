#!/usr/bin/env python3
"""Perplexity of a model, with adapters or without, on a text file; comparable between engines.

python tools/perplexity.py text.txt --model_path demo
python tools/perplexity.py text.txt --lora_path lora-checkpoints/demo --engine llama.cpp
python tools/perplexity.py text.txt --model_path model-q4_k_m.gguf --lora_path adapter.gguf
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard import parsing
from onecard.chat_config import PerplexityConfig
from onecard.errors import run_program


def main() -> None:
    options = parsing.parse(PerplexityConfig, sys.argv[1:], description=__doc__)
    from onecard import gguf, hub, measure  # after the options: --help needs no torch

    how = (hub.for_engine(options.engine), hub.fetch_adapter, gguf.for_llama)
    print(measure.describe(*measure.perplexity(options, *how, say=print)))


if __name__ == "__main__":
    run_program(main, "--bits or --context")
