#!/usr/bin/env python3
"""Export a model and its adapter as GGUF files for llama.cpp and Ollama, and compare them with the model.

python tools/export_gguf.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("export-gguf")
