"""An answer for a window: started, passed on as it grows, and stopped by the page that asked for it.

It knows no component of a window. Sessions are gradio's: each open page has one.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from typing import Any

from onecard.config.generation import TRAINED, ActiveAdapters, Generation
from onecard.data.conversation import Conversation
from onecard.errors import UserError
from onecard.inference.chat import Chat
from onecard.inference.decoding import NO_MEMORY
from onecard.inference.detokenizer import PartialText
from onecard.system.console import say
from onecard.ui import status as ui_status
from onecard.ui.status import AnswerUpdate

PATIENCE = 30  # seconds; a piece is a token, some hundred tokens of a prompt, or the loading of a model
SILENCE = 1  # seconds of waiting before anything is printed
SHOWN_EVERY = 0.05  # seconds; a browser gains nothing from more updates


class Sessions:
    """The answers that open pages wait for, and which of them shall stop; a page has one at a time.

    session: gradio's name of the page.
    """

    def __init__(self) -> None:
        self.stops: dict[str, threading.Event] = {}  # set to stop the session's answer
        self.waiting: set[str] = set()  # sessions whose turn in the queue has not come

    def begin(self, session: str) -> None:
        """A button was pressed; the answer may have to wait for its turn in the queue."""
        self.stops[session] = threading.Event()
        self.waiting.add(session)

    def start(self, session: str) -> None:
        """The turn of this session has come."""
        self.waiting.discard(session)

    def end(self, session: str) -> None:
        self.stops.pop(session, None)
        self.waiting.discard(session)

    def is_waiting(self, session: str) -> bool:
        return session in self.waiting

    def stop(self, session: str) -> None:
        """Stop the answer of this page; those of other pages go on."""
        if session in self.stops:
            self.stops[session].set()

    def is_stopped(self, session: str) -> bool:
        event = self.stops.get(session)
        return event is not None and event.is_set()


class Steps:
    """The pieces of answers that are computed now, so that the program does not end in the middle of one.

    A thread inside torch would abort the process.
    """

    def __init__(self) -> None:
        self.changed, self.count, self.is_over = threading.Condition(), 0, False

    def allow(self) -> None:
        """Allow pieces again, after an earlier window has ended them."""
        self.is_over = False

    def each(self, pieces: Generator) -> Iterator[Any]:
        """Yield the pieces one by one until the program ends."""
        with contextlib.closing(pieces):
            while self._begin():
                try:
                    piece = next(pieces, self)
                finally:
                    with self.changed:
                        self.count -= 1
                        self.changed.notify_all()
                if piece is self:
                    return
                yield piece

    def _begin(self) -> bool:
        with self.changed:
            self.count += not self.is_over
            return not self.is_over

    def end(self) -> None:
        """Allow no further piece, and wait for those that are computed now."""
        with self.changed:
            self.is_over = True
            if not self.changed.wait_for(lambda: not self.count, SILENCE):
                say(f"Waiting up to {PATIENCE} s until the current step of an answer has ended.")
                self.changed.wait_for(lambda: not self.count, PATIENCE)


STEPS = Steps()


def answers(
    sessions: Sessions,
    session: str,
    chat: Chat,
    conversation: Conversation,
    settings: Generation,
    adapters: ActiveAdapters | None,
    lang: str,
    template_name: str = TRAINED,
) -> Iterator[AnswerUpdate]:
    """The answer as it grows. It raises nothing: an exception becomes the last update.

    adapters: the active ones; None means those that the chat was started with.
    """
    last_shown, text = 0.0, PartialText("")
    try:
        stream = chat.stream(
            conversation, settings, adapters, lambda: sessions.is_stopped(session), template_name
        )
        for reply in stream:
            text = reply.text
            now = time.monotonic()
            if reply.finished or now - last_shown >= SHOWN_EVERY:
                last_shown = now
                message = ui_status.describe(reply, chat, lang)
                yield AnswerUpdate(text, message, reply.finished == NO_MEMORY)
    except UserError as error:
        yield AnswerUpdate(text, str(error), True)
    except Exception as error:
        if os.environ.get("ONECARD_DEBUG"):
            traceback.print_exc()
        yield AnswerUpdate(text, f"{type(error).__name__}: {str(error)[:300]}", True)
