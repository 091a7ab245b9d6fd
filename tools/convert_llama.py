#!/usr/bin/env python3
"""Convert a LLaMA model to the layout of transformers, back, or to another number of files.

python tools/convert_llama.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("convert")
