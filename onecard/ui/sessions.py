"""An answer for a window: started, shown as it grows, and stopped by the page that asked for it.

It knows no component of a window; sessions are gradio's, one for each open page.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from typing import Any

from onecard.config.generation import TRAINED, Generation, Mixture
from onecard.data.conversation import Conversation
from onecard.errors import UserError
from onecard.inference.chat import Chat
from onecard.inference.decoding import NO_MEMORY
from onecard.inference.detokenizer import Text
from onecard.system.console import say
from onecard.ui import status as ui_status
from onecard.ui.status import Said

PATIENCE = 30  # seconds: a piece is a token, some hundred of a prompt, or the loading of a model that waits
UNTOLD = 1  # second of it that needs no word
SHOWN_EVERY = 0.05  # seconds: a browser gains nothing from more


class Sessions:
    """Who wants their answer stopped; each open page has a name of its own and one answer at a time."""

    def __init__(self) -> None:
        self.asking: dict[str, threading.Event] = {}
        self.waiting: set[str] = set()

    def begin(self, session: str) -> None:
        """A button was pressed; the answer may still have to wait for its turn."""
        self.asking[session] = threading.Event()
        self.waiting.add(session)

    def start(self, session: str) -> None:
        """Its turn has come."""
        self.waiting.discard(session)

    def end(self, session: str) -> None:
        self.asking.pop(session, None)
        self.waiting.discard(session)

    def is_waiting(self, session: str) -> bool:
        return session in self.waiting

    def stop(self, session: str) -> None:
        """Stop what this page asked for; others go on."""
        if session in self.asking:
            self.asking[session].set()

    def is_stopped(self, session: str) -> bool:
        event = self.asking.get(session)
        return event is not None and event.is_set()


class Steps:
    """Pieces of answers that are being made now; a program that ends in the middle of one is aborted."""

    def __init__(self) -> None:
        self.changed, self.count, self.is_over = threading.Condition(), 0, False

    def allow(self) -> None:
        """A window is opened, perhaps after another one was ended."""
        self.is_over = False

    def each(self, made: Generator) -> Iterator[Any]:
        """What is made, piece by piece, until the program ends."""
        with contextlib.closing(made):
            while self._begin():
                try:
                    piece = next(made, self)
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
        """Begin no further piece, wait for those that are being made."""
        with self.changed:
            self.is_over = True
            if not self.changed.wait_for(lambda: not self.count, UNTOLD):
                say(f"Waiting for a part of an answer to end, {PATIENCE} s at most.")
                self.changed.wait_for(lambda: not self.count, PATIENCE)


STEPS = Steps()


def answers(
    sessions: Sessions,
    session: str,
    chat: Chat,
    asked: Conversation,
    settings: Generation,
    mixture: Mixture | None,
    lang: str,
    shape: str = TRAINED,
) -> Iterator[Said]:
    """What is there as the answer grows; no exception comes through.

    shape: name of the prompt template.
    """
    shown, text = 0.0, Text("")
    try:
        stream = chat.stream(asked, settings, mixture, lambda: sessions.is_stopped(session), shape)
        for reply in stream:
            text = reply.text
            now = time.monotonic()
            if reply.finished or now - shown >= SHOWN_EVERY:
                shown = now
                yield text, ui_status.describe(reply, chat, lang), reply.finished == NO_MEMORY
    except UserError as error:
        yield text, str(error), True
    except Exception as error:
        if os.environ.get("ONECARD_DEBUG"):
            traceback.print_exc()
        yield text, f"{type(error).__name__}: {str(error)[:300]}", True
