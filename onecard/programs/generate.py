"""One instruction, one answer, in a browser or, with --terminal, here.

python generate.py --lora_path lora-checkpoints/demo
"""

import contextlib
import sys

from onecard.config import chat as chat_config
from onecard.config import options as config_options
from onecard.ui import packages

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options, given = config_options.parse_given(chat_config.SingleConfig, arguments, __doc__)
    chat_config.check_used(options)
    packages.check(options.terminal)
    from onecard.conversion import gguf_cache
    from onecard.inference import chat
    from onecard.ui import terminal  # after the options: --help needs no torch

    if options.terminal:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            talk = chat.start(options, gguf_cache.for_llama)
        terminal.talk(talk, chat.with_its_mode(talk, options, given), single_turn=True)
        return
    from onecard.ui import guard, page, single_window

    guard.check_exposure(options)
    talk = chat.start(options, gguf_cache.for_llama)
    options = chat.with_its_mode(talk, options, given)
    page.launch(single_window.build_page(talk, options), options)
