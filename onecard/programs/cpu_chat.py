"""Chat in the terminal on the CPU, with llama.cpp. Model and adapters are exported to GGUF when needed.

python tools/cpu_chat.py --lora_path lora-checkpoints/demo
echo "What is a rainbow?" | python tools/cpu_chat.py --mode greedy
"""

import contextlib
import sys

from onecard.config import chat as config_chat
from onecard.config import declaration
from onecard.config import options as config_options
from onecard.system import commands

SETTINGS = config_chat.CpuConfig  # the class of its options
# options whose smaller values need less memory
LESS_MEMORY = declaration.memory_savers(SETTINGS, [config_chat.TRANSFORMERS])


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    config_chat.check_used(options)
    from onecard.ui import packages  # imported late, because --help loads no other room

    packages.check(in_terminal=True, part="cpu")
    commands.require("llama_cpp", "cpu")
    from onecard.conversion import gguf_cache
    from onecard.inference import chat
    from onecard.ui import terminal  # imported late, because --help needs no torch

    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers only
        session = chat.start(options, gguf_cache.for_llama)
    terminal.talk(session, options)
