"""Talk in this terminal with a model and its adapters in llama.cpp; they are exported to GGUF when needed.

python tools/cpu_chat.py --lora_path lora-checkpoints/demo
echo "What is a rainbow?" | python tools/cpu_chat.py --mode greedy
"""

import contextlib
import sys

from onecard import chat_config, parsing

LESS_MEMORY = "--context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = parsing.parse(chat_config.CpuConfig, arguments, description=__doc__)
    chat_config.check_used(options)
    from onecard import chat, gguf, hub, terminal  # after the options: --help needs no torch

    terminal.check_editor("cpu")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
        made = chat.start(options, hub.for_engine(options.engine), hub.fetch_adapter, gguf.for_llama, print)
    terminal.talk(made, options)
