#!/usr/bin/env python3
"""Perplexity of a model, with adapters or without, on a text file; comparable between engines.

python tools/perplexity.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("perplexity")
