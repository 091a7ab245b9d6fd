#!/usr/bin/env python3
"""Fetch a model, verified: resumed after a cut, every checksum compared, its commit written down.

python tools/download.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("download")
