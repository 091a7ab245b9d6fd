#!/usr/bin/env python3
"""Merge a LoRA adapter into its 16-bit base model file by file, without loading the model.

python tools/merge_lora.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("merge")
