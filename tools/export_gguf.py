#!/usr/bin/env python3
"""A model and its adapter as GGUF files for llama.cpp and Ollama, compared with the model they are made from.

python tools/export_gguf.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("export-gguf")
