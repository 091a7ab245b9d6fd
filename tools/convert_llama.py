#!/usr/bin/env python3
"""Convert a LLaMA model from its original layout to that of transformers, back, or to other numbers of files.

python tools/convert_llama.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("convert")
