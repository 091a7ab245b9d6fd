#!/usr/bin/env python3
"""Create, list, revoke and rotate the API keys of the HTTP service on this machine.

python serve/keys.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("keys")
