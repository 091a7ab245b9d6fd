#!/usr/bin/env python3
"""Serve a model and its adapters over HTTP: the calls of OpenAI and of TigerBot, on this machine.

python serve/app.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("serve")
