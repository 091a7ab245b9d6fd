#!/usr/bin/env python3
"""Download a model. Interrupted downloads resume, checksums are compared, and the commit is recorded.

python tools/download.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("download")
