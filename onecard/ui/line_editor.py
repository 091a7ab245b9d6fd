"""A message that is edited in a terminal, with a history; the only file that needs prompt_toolkit.

Import it only where a terminal is read: a pipe works without the package.
"""

import contextlib
import os
from collections.abc import Callable, Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from onecard.system.files import cache_folder


class LenientHistory(FileHistory):
    """The questions of earlier sessions; the chat goes on when one cannot be written."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            super().store_string(string)


def history() -> History:
    """The history in the cache folder, or one in memory where no file can be written."""
    path = cache_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)  # only its owner may read the questions
    except OSError:
        return InMemoryHistory()
    return LenientHistory(str(path))


def editor(commands: Iterable[str]) -> Callable[[], str]:
    """A function that reads a message of one or more lines; it raises EOFError and KeyboardInterrupt.

    commands: names that Tab completes after a /.
    """
    keys, here = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=here)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=here)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    line = PromptSession(
        history=history(),
        completer=WordCompleter([f"/{name}" for name in commands], sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        enable_suspend=True,
    )
    return lambda: line.prompt("> ")
