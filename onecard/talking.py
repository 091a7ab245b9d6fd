"""An answer for a window: started, shown as it grows, stopped by the one who asked, and told how it went.

It knows no component of a window; sessions are gradio's, one for each open page.
"""

import contextlib
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from typing import Any

from onecard.answer import Text
from onecard.chat_config import BASE, MIX, TRAINED, Generation
from onecard.decoding import CANCELLED, END, LENGTH, NO_MEMORY, STOP
from onecard.errors import UserError
from onecard.prompt import Conversation, Turn

PATIENCE = 30  # seconds: a piece is a token, some hundred of a prompt, or the loading of a model that waits
UNTOLD = 1  # second of it that needs no word
SHOWN_EVERY = 0.05  # seconds: a browser gains nothing from more
BY_ITSELF = (END, STOP, LENGTH)
Said = tuple[Text, str, bool]  # an answer, what the status line says, is it an error
WHY = {
    LENGTH: ("cut at the most new tokens", "已达最多新词元"),
    STOP: ("stop word", "遇到停止词"),
    CANCELLED: ("stopped", "已停止"),
    NO_MEMORY: (
        "out of memory: this much was written. Fewer beams, a shorter chat or fewer bits need less",
        "内存不足，以上为已生成部分；可减少束宽、缩短对话或降低位数",
    ),
}


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

    def end(self, say: Callable[[str], None]) -> None:
        """Begin no further piece, wait for those that are being made."""
        with self.changed:
            self.is_over = True
            if not self.changed.wait_for(lambda: not self.count, UNTOLD):
                say(f"Waiting for a part of an answer to end, {PATIENCE} s at most.")
                self.changed.wait_for(lambda: not self.count, PATIENCE)


STEPS = Steps()


def conversation(
    turns: list[dict[str, str]], system: str, key: str = "answer", unfinished: bool = False
) -> Conversation:
    """What the model is asked: earlier turns whole, the last one without its answer unless that goes on.

    key: which answers count, of two side by side.
    """
    made = [Turn("system", system)] if system else []
    for turn in turns[:-1]:
        made.append(Turn("user", turn["question"], turn.get("input", "")))
        made.append(Turn("assistant", turn.get(key) or turn.get("answer", "")))
    last = turns[-1]
    made.append(Turn("user", last["question"], last.get("input", "")))
    if unfinished:
        made.append(Turn("assistant", last.get(key) or last.get("answer", "")))
    return Conversation(tuple(made))


def answers(
    sessions: Sessions,
    session: str,
    chat,
    asked: Conversation,
    settings: Generation,
    mixture,
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
                yield text, describe(reply, chat, lang), reply.finished == NO_MEMORY
    except UserError as error:
        yield text, str(error), True
    except Exception as error:
        if os.environ.get("ONECARD_DEBUG"):
            traceback.print_exc()
        yield text, f"{type(error).__name__}: {str(error)[:300]}", True


def describe(reply, chat, lang: str) -> str:
    """The status line: speed, tokens of the context, device, and why it ended."""
    zh = lang == "zh"
    if reply.loading:
        others = ", ".join(chat.engine.beside())
        told = "正在载入模型 ..." if zh else "loading the model ..."
        shared = f"（{others} 正在同一设备上训练）" if zh else f" ({others} is trained on the same device)"
        return told + (shared if others else "")
    if not reply.finished and not reply.text.tokens:
        word = "读取" if zh else "reading"
        return f"{word} {reply.read} / {reply.prompt_tokens} {'词元' if zh else 'tokens'}"
    used = reply.prompt_tokens + reply.text.tokens
    parts = [
        f"{reply.speed:.1f} {'词元/秒' if zh else 'tokens/s'}",
        f"{used} / {chat.engine.context} {'词元（上下文）' if zh else 'tokens of the context'}",
        f"{chat.engine.name}, {chat.engine.describe()[zh]}",
    ]
    if reply.first is not None:
        parts.insert(1, f"{'首词元' if zh else 'first after'} {reply.first:.1f} s")
    if reply.finished and reply.seed is not None:
        parts.append(f"{'种子' if zh else 'seed'} {reply.seed}")
    if reply.left_out:
        left = reply.left_out
        turns = "turn" if left == 1 else "turns"
        parts.append(f"{left} 轮较早对话未包含" if zh else f"{left} oldest {turns} left out")
    if reply.finished in WHY:
        parts.append(WHY[reply.finished][zh])
    return " · ".join(parts)


def together(sides: dict[str, Said], names: dict[str, str], note: str = "") -> tuple[str, bool]:
    """The status line of one answer, or of two side by side, and whether it is an error.

    names: of the sides, said when there are two that say something else; note: goes behind it.
    """
    problems = {key: told for key, (_, told, wrong) in sides.items() if wrong}
    shown = problems or {key: told for key, (_, told, _) in sides.items()}
    lines = list(dict.fromkeys(shown.values()))
    if len(sides) > 1 and (len(lines) > 1 or len(shown) < len(sides)):
        lines = [f"{names[key]}: {told}" for key, told in shown.items()]
    return " | ".join([*lines, *filter(None, [note])]), bool(problems)


def came_to_nothing(sides: dict[str, Said]) -> bool:
    """Whether no side has text, and none ended by itself."""
    return not any(text.whole or text.finished in BY_ITSELF for text, _, _ in sides.values())


def system_for(chat, shape: str, system: str, lang: str) -> tuple[str, str]:
    """The system prompt as far as a template holds one, and what to say when it does not; raises UserError.

    shape: name of the template.
    """
    form = chat.template_of(shape)
    if not system or form.system is not None:
        return system, ""
    if lang == "zh":
        return "", f"模板 {form.name} 没有系统提示，已略去"
    return "", f"the system prompt is left out: template {form.name} has none"


def mixture_of(choice: str, weights: dict[str, float], names: list[str]) -> tuple[tuple[str, float], ...]:
    """Adapters of a picker: the base alone, one of them, or all with a weight."""
    if choice in names:
        return ((choice, weights.get(choice, 1.0)),)
    if choice == MIX:
        return tuple((name, weights.get(name, 1.0)) for name in names if weights.get(name, 1.0))
    return ()


def choice_of(mixture: tuple[tuple[str, float], ...]) -> str:
    return BASE if not mixture else mixture[0][0] if len(mixture) == 1 else MIX
