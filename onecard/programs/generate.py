"""One instruction, one answer, in a browser or, with --terminal, here.

python generate.py --lora_path lora-checkpoints/demo
"""

import contextlib
import sys

from onecard import chat_config, parsing

LESS_MEMORY = "--bits or --context"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options, given = parsing.parse_given(chat_config.SingleConfig, arguments, __doc__)
    chat_config.check_used(options)
    from onecard import chat, gguf, hub, terminal  # after the options: --help needs no torch

    load = (hub.for_engine(options.engine), hub.fetch_adapter, gguf.for_llama, print)
    if options.terminal:
        terminal.check_editor("chat")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            talk = chat.start(options, *load)
        terminal.talk(talk, chat.with_its_mode(talk, options, given), single_turn=True)
        return
    from onecard import guard, page, windows

    guard.check_exposure(options)
    talk = chat.start(options, *load)
    options = chat.with_its_mode(talk, options, given)
    page.launch(windows.single(talk, options), options)
