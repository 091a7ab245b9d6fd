#!/usr/bin/env python3
"""JSON, JSONL or CSV rows -> one Parquet file, in pieces, so that the file may be larger than memory.

python tools/json_to_parquet.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("json-to-parquet")
