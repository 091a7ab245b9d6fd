"""A chat in a terminal or through a pipe: reads questions and commands, shows answers as they grow.

With a terminal at both ends, lines can be edited and an answer is drawn while it may still change. Otherwise
each line is a question and only answers are printed, so that it works in scripts. The Chat is handed in.
"""

import os
import re
import sys

from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.inference.chat import Chat
from onecard.system import console
from onecard.ui import terminal_commands, terminal_io
from onecard.ui.terminal_io import tell
from onecard.ui.terminal_session import Session

SURROGATES = re.compile("[\ud800-\udfff]")  # in the place of bytes that are no text
WELCOME = (
    "Enter sends; Alt-Enter, or \\ at the end of a line, begins a new line. /help lists commands, "
    "Ctrl-C stops an answer, Ctrl-D ends."
)


def talk(chat: Chat, settings: ChatConfig, single_turn: bool = False) -> None:
    """Talk until /exit or the end of the input; single_turn: every question begins a new conversation.

    Through a pipe it raises UserError at the end when lines failed.
    """
    session = Session(chat, settings, single_turn)
    lines = Lines(session)
    if session.live:
        tell(WELCOME)
    console.accept_any_text()
    read = terminal_io.plain_line
    if session.live:
        from onecard.ui import line_editor  # a pipe works without prompt_toolkit

        read = line_editor.editor([*terminal_commands.COMMANDS, "exit"])
    try:
        while True:
            try:
                if not lines.take(read()):
                    break
            except EOFError:
                break
            except KeyboardInterrupt:
                if not session.live:
                    raise
                session.screen.end(always=False)
                tell("Ctrl-C stops an answer; /exit or Ctrl-D leaves.")
    except BrokenPipeError:  # the reader, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if lines.failed and not session.live:
        raise UserError(f"{lines.failed} of {lines.count} lines failed.")


class Lines:
    """The lines of one input: each is a message or a command."""

    def __init__(self, session: Session):
        self.session = session
        self.count = self.failed = 0
        self.is_other_encoding = False

    def take(self, text: str) -> bool:
        """Do what one line says; False for /exit."""
        plain = SURROGATES.sub("\ufffd", text)
        if plain != text and not self.is_other_encoding:
            self.is_other_encoding = True
            tell(f"warning: the input is not {sys.stdin.encoding}: its other bytes become \ufffd.")
            tell("Set PYTHONIOENCODING to its encoding, such as gbk, for the letters that were typed.")
        text = plain.strip()
        if not text:
            return True
        is_command = text.startswith("/") and not text.startswith("//")
        name, arguments = [*text[1:].split(maxsplit=1), "", ""][:2] if is_command else ("", "")
        if is_command and name == "exit":
            return False
        self.count += 1
        try:
            if is_command:
                terminal_commands.run(self.session, name, arguments)
            else:
                question = text[1:] if text.startswith("/") else text
                self.session.ask(question, [] if self.session.single_turn else self.session.turns)
        except UserError as error:
            self.failed += 1
            tell(f"error: {error}")
        return True
