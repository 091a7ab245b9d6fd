"""One instruction, one answer, in a browser or, with --terminal, here.

python generate.py --lora_path lora-checkpoints/demo
"""

import contextlib
import sys

from onecard.config import chat as chat_config
from onecard.config import options as config_options

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options, given = config_options.parse_given(chat_config.SingleConfig, arguments, __doc__)
    chat_config.check_used(options)
    from onecard.conversion import gguf_cache
    from onecard.inference import chat as inference_chat
    from onecard.ui import terminal as ui_terminal  # after the options: --help needs no torch

    if options.terminal:
        ui_terminal.check_editor("chat")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            talk = inference_chat.start(options, gguf_cache.for_llama)
        ui_terminal.talk(talk, inference_chat.with_its_mode(talk, options, given), single_turn=True)
        return
    from onecard.ui import guard as ui_guard
    from onecard.ui import page as ui_page
    from onecard.ui import single_window

    ui_guard.check_exposure(options)
    talk = inference_chat.start(options, gguf_cache.for_llama)
    options = inference_chat.with_its_mode(talk, options, given)
    ui_page.launch(single_window.single(talk, options), options)
