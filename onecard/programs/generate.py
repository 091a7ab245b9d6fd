"""Answer single instructions in a browser or, with --terminal, in the terminal.

python generate.py --lora_path lora-checkpoints/demo
"""

import contextlib
import sys

from onecard.config import chat as config_chat
from onecard.config import declaration
from onecard.config import options as config_options

SETTINGS = config_chat.SingleConfig  # the class of its options
# options whose smaller values need less memory
LESS_MEMORY = declaration.memory_savers(SETTINGS)


def main(arguments: list[str]) -> None:
    options, explicit = config_options.parse_given(SETTINGS, arguments, __doc__)
    config_chat.check_used(options)
    from onecard.ui import packages  # imported late, because --help loads no other room

    packages.check(options.terminal)
    from onecard.conversion import gguf_cache
    from onecard.inference import chat
    from onecard.ui import terminal  # imported late, because --help needs no torch

    if options.terminal:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers only
            session = chat.start(options, gguf_cache.for_llama)
        terminal.talk(session, chat.with_its_mode(session, options, explicit), single_turn=True)
        return
    from onecard.ui import guard, page, single_window

    guard.check_exposure(options)
    session = chat.start(options, gguf_cache.for_llama)
    options = chat.with_its_mode(session, options, explicit)
    page.launch(single_window.build_page(session, options), options)
