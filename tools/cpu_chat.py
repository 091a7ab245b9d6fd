#!/usr/bin/env python3
"""Talk in this terminal with a model and its adapters in llama.cpp; they are exported to GGUF when needed.

python tools/cpu_chat.py --lora_path lora-checkpoints/demo
echo "What is a rainbow?" | python tools/cpu_chat.py --mode greedy
"""

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard import chat_config, parsing
from onecard.errors import run_program


def main() -> None:
    options = parsing.parse(chat_config.CpuConfig, sys.argv[1:], description=__doc__)
    chat_config.check_used(options)
    from onecard import chat, gguf, hub, terminal  # after the options: --help needs no torch

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        made = chat.start(options, hub.for_engine(options.engine), hub.fetch_adapter, gguf.for_llama, print)
    terminal.talk(made, options)


if __name__ == "__main__":
    run_program(main, "--context")
