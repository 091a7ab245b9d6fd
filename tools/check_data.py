#!/usr/bin/env python3
"""Check rows before training on them: schema, lengths, cut rows, suspicious rows, and the cost of training.

python tools/check_data.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("check-data")
