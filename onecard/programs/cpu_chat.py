"""Talk in this terminal with a model and its adapters in llama.cpp; they are exported to GGUF when needed.

python tools/cpu_chat.py --lora_path lora-checkpoints/demo
echo "What is a rainbow?" | python tools/cpu_chat.py --mode greedy
"""

import contextlib
import sys

from onecard.config import chat as chat_config
from onecard.config import options as config_options
from onecard.system import commands
from onecard.ui import packages

LESS_MEMORY = "--context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(chat_config.CpuConfig, arguments, description=__doc__)
    chat_config.check_used(options)
    packages.check(in_terminal=True, part="cpu")
    commands.require("llama_cpp", "cpu")
    from onecard.conversion import gguf_cache
    from onecard.inference import chat
    from onecard.ui import terminal  # after the options: --help needs no torch

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        made = chat.start(options, gguf_cache.for_llama)
    terminal.talk(made, options)
