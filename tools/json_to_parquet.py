#!/usr/bin/env python3
"""Convert JSON, JSONL or CSV rows to one Parquet file, piece by piece: files may be larger than the memory.

python tools/json_to_parquet.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("json-to-parquet")
