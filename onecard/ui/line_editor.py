"""A message edited in a terminal, with questions of earlier days; the only file that needs prompt_toolkit.

Import it where a terminal is read and nowhere else: pipes work without the package.
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


class Remembered(FileHistory):
    """Questions of earlier days; one that cannot be written is no reason to stop."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError, UnicodeError):
            super().store_string(string)


def history() -> History:
    path = cache_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        path.chmod(0o600)  # questions are nobody else's business
    except OSError:
        return InMemoryHistory()
    return Remembered(str(path))


def editor(commands: Iterable[str]) -> Callable[[], str]:
    """Reads a message of one or more lines from the terminal; raises EOFError and KeyboardInterrupt."""
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
