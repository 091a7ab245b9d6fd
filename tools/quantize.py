#!/usr/bin/env python3
"""Make a model smaller: GPTQ, AWQ or bitsandbytes, in the folder that transformers and vLLM load.

python tools/quantize.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("quantize")
