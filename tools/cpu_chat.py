#!/usr/bin/env python3
"""Chat in the terminal on the CPU, with llama.cpp. Model and adapters are exported to GGUF when needed.

python tools/cpu_chat.py --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.__main__ import start

if __name__ == "__main__":
    start("chat")
