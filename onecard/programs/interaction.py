"""Chat in a browser or, with --terminal, here; --studio adds a tab for training.

python interaction.py --lora_path lora-checkpoints/demo
"""

import contextlib
import functools
import sys

from onecard.config import chat as chat_config
from onecard.config import options as config_options

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(chat_config.ChatConfig, arguments, __doc__)
    chat_config.check_used(options)
    from onecard.conversion import gguf_cache
    from onecard.inference import chat as inference_chat
    from onecard.ui import terminal as ui_terminal  # after the options: --help needs no torch

    if options.terminal:
        ui_terminal.check_editor("chat")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            talk = inference_chat.start(options, gguf_cache.for_llama)
        ui_terminal.talk(talk, options)
        return
    from onecard.runs import jobs
    from onecard.ui import chat_window as ui_chat_window
    from onecard.ui import guard as ui_guard
    from onecard.ui import page as ui_page
    from onecard.ui import training_window

    ui_guard.check_exposure(options)
    training = training_window.build if options.studio else None
    if options.studio:  # a training may need the memory before a question does
        beside = functools.partial(jobs.training_on, training_window.WORKSPACE)
        talk = inference_chat.later(options, gguf_cache.for_llama, beside)
    else:
        talk = inference_chat.start(options, gguf_cache.for_llama)
    ui_page.launch(ui_chat_window.turns(talk, options, training), options)
