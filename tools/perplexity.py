#!/usr/bin/env python3
"""Measure the perplexity of a model, with or without adapters, on a text; engines can be compared.

python tools/perplexity.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("perplexity")
