#!/usr/bin/env python3
"""Fine-tune a language model on your own rows: train a LoRA adapter, or all weights.

python finetune.py --help
"""

from onecard.__main__ import start

if __name__ == "__main__":
    start("finetune")
