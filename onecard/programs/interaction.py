"""Chat in a browser or, with --terminal, here; --studio adds a tab for training.

python interaction.py --lora_path lora-checkpoints/demo
"""

import contextlib
import functools
import sys

from onecard.config import chat as chat_config
from onecard.config import options as config_options
from onecard.ui import packages

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(chat_config.ChatConfig, arguments, __doc__)
    chat_config.check_used(options)
    packages.check(options.terminal)
    from onecard.conversion import gguf_cache
    from onecard.inference import chat
    from onecard.ui import terminal  # after the options: --help needs no torch

    if options.terminal:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            talk = chat.start(options, gguf_cache.for_llama)
        terminal.talk(talk, options)
        return
    from onecard.runs import jobs
    from onecard.ui import chat_window, guard, page, training_window

    guard.check_exposure(options)
    training = training_window.build if options.studio else None
    if options.studio:  # a training may need the memory before a question does
        beside = functools.partial(jobs.training_on, training_window.WORKSPACE)
        talk = chat.later(options, gguf_cache.for_llama, beside)
    else:
        talk = chat.start(options, gguf_cache.for_llama)
    page.launch(chat_window.build_page(talk, options, training), options)
