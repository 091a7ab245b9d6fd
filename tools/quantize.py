#!/usr/bin/env python3
"""Quantise a model with GPTQ, AWQ or bitsandbytes, into a folder that transformers and vLLM can load.

python tools/quantize.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("quantize")
