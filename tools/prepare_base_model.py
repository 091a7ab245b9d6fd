#!/usr/bin/env python3
"""Add special tokens to a base model, and an embedding row for every token of its tokenizer.

python tools/prepare_base_model.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("prepare-base")
