"""Which package a chat needs where it is shown. Nothing that may be missing is imported at the top."""

from onecard.system import commands


def check(in_terminal: bool, part: str = "chat") -> None:
    """Raise UserError when a window lacks gradio, or a terminal that is typed into lacks prompt_toolkit.

    Call it before anything that takes time. part: of the set-up that installs the package.
    """
    if not in_terminal:
        commands.require("gradio", part)
        return
    from onecard.ui import terminal_io

    if terminal_io.in_terminal():  # a pipe works without prompt_toolkit
        commands.require("prompt_toolkit", part)
