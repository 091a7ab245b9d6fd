"""Chat in a browser or, with --terminal, in the terminal. The option --studio adds a tab for training.

python interaction.py --lora_path lora-checkpoints/demo
"""

import contextlib
import functools
import sys

from onecard.config import chat as config_chat
from onecard.config import declaration
from onecard.config import options as config_options

SETTINGS = config_chat.ChatConfig  # the class of its options
# options whose smaller values need less memory
LESS_MEMORY = declaration.memory_savers(SETTINGS)


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, __doc__)
    config_chat.check_used(options)
    from onecard.ui import packages  # imported late, because --help loads no other room

    packages.check(options.terminal)
    from onecard.conversion import gguf_cache
    from onecard.inference import chat
    from onecard.ui import terminal  # imported late, because --help needs no torch

    if options.terminal:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answers only
            session = chat.start(options, gguf_cache.for_llama)
        terminal.talk(session, options)
        return
    from onecard.runs import jobs
    from onecard.ui import chat_window, guard, page, training_window

    guard.check_exposure(options)
    training = training_window.build if options.studio else None
    if options.studio:  # load the model late, because a training may need the memory first
        running_trainings = functools.partial(jobs.training_on, training_window.WORKSPACE)
        session = chat.later(options, gguf_cache.for_llama, running_trainings)
    else:
        session = chat.start(options, gguf_cache.for_llama)
    page.launch(chat_window.build_page(session, options, training), options)
