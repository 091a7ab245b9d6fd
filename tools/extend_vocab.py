#!/usr/bin/env python3
"""Add characters or pieces to a tokenizer, and print how many tokens this saves.

python tools/extend_vocab.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("extend-vocab")
