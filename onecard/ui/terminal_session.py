"""A conversation in a terminal: its turns, its settings, and the answer to a question. It reads no line."""

import dataclasses
import os
import traceback
from collections.abc import Callable, Iterator

from onecard.config.chat import ChatConfig
from onecard.config.generation import TRAINED, ActiveAdapters
from onecard.data.conversation import Conversation
from onecard.errors import UserError
from onecard.inference import transcript
from onecard.inference.chat import Chat, Reply
from onecard.inference.decoding import END, LENGTH, STOP
from onecard.inference.transcript import LEFT, Turns
from onecard.ui import status as ui_status
from onecard.ui import terminal_io
from onecard.ui.terminal_io import Screen, in_terminal, tell


class Session:
    """What the next answer depends on; ui/terminal_commands.py changes it."""

    def __init__(self, chat: Chat, settings: ChatConfig, single_turn: bool):
        """single_turn: every question begins a new conversation."""
        self.chat, self.settings, self.single_turn = chat, settings, single_turn
        self.live = in_terminal()
        self.screen = Screen(self.live and os.environ.get("TERM", "dumb") != "dumb")
        self.active_adapters: ActiveAdapters = chat.active_adapters
        self.template_name = TRAINED
        self.turns: Turns = []
        self.before: Turns = []  # the turns before the last question, which /retry asks again
        self.question = self.input = ""  # input: only a turn that a window has saved has one
        if settings.system and not self.has_system():
            tell(f"--system: {self.no_system()}")
            self.settings = dataclasses.replace(settings, system="")

    def ask(self, question: str, before: Turns, about: str = "") -> None:
        """Print the answer to a question that follows these turns; about: the input of the question.

        Raises UserError when there is no answer; then the conversation stays as it was.
        """
        self.question, self.before, self.input = question, before, about
        turn = {"question": question, **({"input": about} if about else {})}
        conversation = transcript.conversation([*before, turn], self.settings.system)
        reply = None
        with terminal_io.stoppable(self.live) as cancelled:
            for reply in self._replies(conversation, cancelled):
                begun = reply.text.tokens or reply.finished
                behind = reply.text.open if begun else f"reading {reply.read}/{reply.prompt_tokens} tokens"
                behind = "loading the model ..." if reply.loading else behind
                if reply.loading and reply.ended and not self.live:  # a terminal has it below the answer
                    tell(f"{reply.ended} The model is loaded again.")
                self.screen.show(reply.text.stable, behind)
        self.screen.end()
        assert reply is not None, "Chat.stream ends with a finished reply"
        by_itself = reply.finished in (END, STOP, LENGTH)
        if by_itself or reply.text.stable:
            settings = self.settings
            if reply.seed is not None:
                settings = dataclasses.replace(settings, seed=reply.seed)
            made_by = transcript.made_by(
                self.chat, settings, {LEFT: self.active_adapters}, self.template_name
            )
            self.turns = [*before, {**turn, LEFT: reply.text.stable, **made_by}]
        message = f"{reply.text.tokens} tokens · {ui_status.describe(reply, self.chat, 'en')}"
        if self.live:
            self.screen.remark(message)
        elif not by_itself:
            raise UserError(message)

    def retry(self) -> None:
        """Ask the last question again; raises UserError when there is none."""
        if not self.question:
            raise UserError("There is no question yet.")
        self.ask(self.question, self.before, self.input)

    def has_system(self) -> bool:
        """Whether the template has a place for a system prompt."""
        return self.chat.template_of(self.template_name).system is not None

    def no_system(self) -> str:
        """Why there can be no system prompt."""
        name = self.chat.template_of(self.template_name).name
        return f"the template {name} has no place for a system prompt."

    def _replies(self, conversation: Conversation, cancelled: Callable[[], bool]) -> Iterator[Reply]:
        """The answer as it grows; every exception becomes a UserError."""
        try:
            yield from self.chat.stream(
                conversation, self.settings, self.active_adapters, cancelled, self.template_name
            )
        except Exception as error:  # of any library: the conversation is worth more than the program's end
            self.screen.end(always=False)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, UserError):
                reason = str(error)
            elif os.environ.get("ONECARD_DEBUG"):
                traceback.print_exc()
            again = " The question is not in the conversation; /retry asks it again." if self.live else ""
            raise UserError(reason + again) from None
