"""Chat in a browser or, with --terminal, here; --studio adds a tab for training.

python interaction.py --lora_path lora-checkpoints/demo
"""

import contextlib
import functools
import sys

from onecard import chat_config, parsing

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = parsing.parse(chat_config.ChatConfig, arguments, __doc__)
    chat_config.check_used(options)
    from onecard import chat, gguf, hub, terminal  # after the options: --help needs no torch

    load = (hub.for_engine(options.engine), hub.fetch_adapter, gguf.for_llama, print)
    if options.terminal:
        terminal.check_editor("chat")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            talk = chat.start(options, *load)
        terminal.talk(talk, options)
        return
    from onecard import chat_window, guard, page, runs, studio

    guard.check_exposure(options)
    training = functools.partial(studio.build, locate=hub.locate, here=hub.here) if options.studio else None
    if options.studio:  # a training may need the memory before a question does
        talk = chat.later(options, *load, functools.partial(runs.training_on, studio.WORKSPACE))
    else:
        talk = chat.start(options, *load)
    page.launch(chat_window.turns(talk, options, training), options)
