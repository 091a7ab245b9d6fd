"""A chat in a terminal or through a pipe: questions in, answers as they grow, and commands.

With a terminal at both ends, lines can be edited and an answer is drawn while it may still change. Otherwise
each line is a question and only answers are printed, so that it works in scripts. The Chat is handed in.
"""

import contextlib
import dataclasses
import math
import os
import re
import signal
import sys
import termios
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from onecard import parsing, talking, transcript
from onecard.chat_config import BASE, ChatConfig, Generation, Mixture
from onecard.decoding import END, LENGTH, STOP
from onecard.errors import UserError
from onecard.fingerprint import cache_folder
from onecard.prompt import Conversation
from onecard.screen import Screen, in_terminal, tell

WELCOME = (
    "Enter sends, Alt-Enter or a last \\ goes on; /help lists commands; Ctrl-C stops an answer, Ctrl-D ends."
)
NONE = "none"


def talk(
    chat: Any, settings: ChatConfig, say: Callable[[str], None] = tell, single_turn: bool = False
) -> None:
    """Talk until /exit or the end of the input; single_turn: every question begins a new conversation.

    say: takes what is no answer. Through a pipe it raises UserError at the end when questions got no answer.
    """
    session = Session(chat, settings, say, single_turn)
    if session.live:
        session.say(WELCOME)
    with contextlib.suppress(AttributeError):  # stand-ins for streams
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")
    read = editor() if session.live else plain_line
    try:
        while True:
            try:
                if not session.take(read()):
                    break
            except EOFError:
                break
            except KeyboardInterrupt:
                if not session.live:
                    raise
                session.screen.end(always=False)
                session.say("Ctrl-C stops an answer; /exit or Ctrl-D leaves.")
    except BrokenPipeError:  # the reader, such as head, has all it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if session.failed and not session.live:
        raise UserError(f"{session.failed} of {session.taken} lines failed.")


def plain_line() -> str:
    """The next line of stdin with those that a backslash adds to it; raises EOFError behind the last."""
    lines = []
    while line := sys.stdin.readline():
        line = line.rstrip("\r\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            break
    if not lines:
        raise EOFError
    return "\n".join(lines)


class Session:
    """A conversation, its settings, and what the commands do to them."""

    def __init__(self, chat: Any, settings: ChatConfig, say: Callable[[str], None], single_turn: bool):
        self.chat, self.settings, self.say, self.single_turn = chat, settings, say, single_turn
        self.live = in_terminal()
        self.screen = Screen(self.live and os.environ.get("TERM", "dumb") != "dumb")
        self.mixture: Mixture = chat.mixture
        self.turns: list[dict[str, str]] = []
        self.before: list[dict[str, str]] = []  # turns before the last question, which /retry asks again
        self.question = ""
        self.taken = self.failed = 0  # lines
        if settings.system and chat.template.system is None:
            say(f"--system: {self._no_system()}")
            self.settings = dataclasses.replace(settings, system="")

    def take(self, text: str) -> bool:
        """Do what one message or command says; False for /exit."""
        text = text.encode("utf-8", "replace").decode().strip()  # bytes that are no text become ?
        if not text:
            return True
        is_command = text.startswith("/") and not text.startswith("//")
        name, rest = [*text[1:].split(maxsplit=1), "", ""][:2] if is_command else ("", "")
        if is_command and name == "exit":
            return False
        self.taken += 1
        try:
            if not is_command:
                question = text[1:] if text.startswith("/") else text
                self.ask(question, [] if self.single_turn else self.turns)
            elif name not in COMMANDS:
                known = " ".join(f"/{name}" for name in COMMANDS)
                raise UserError(f"/{name} is no command.", f"Known: {known}; // begins a message with a /.")
            else:
                COMMANDS[name][0](self, rest)
        except UserError as error:
            self.failed += 1
            self.say(f"error: {error}")
        return True

    def ask(self, question: str, before: list[dict[str, str]]) -> None:
        """Print the answer to a question behind these turns; without one the conversation stays as it was."""
        self.question, self.before = question, before
        asked = talking.conversation([*before, {"question": question}], self.settings.system)
        reply = None
        with stoppable(self.live) as cancelled:
            for reply in self._replies(asked, cancelled):
                begun = reply.text.tokens or reply.finished
                behind = reply.text.open if begun else f"reading {reply.read}/{reply.prompt_tokens} tokens"
                self.screen.show(reply.text.stable, behind)
        self.screen.end()
        assert reply is not None, "Chat.stream ends with a finished reply"
        by_itself = reply.finished in (END, STOP, LENGTH)
        if by_itself or reply.text.stable:
            self.turns = [*before, {"question": question, "answer": reply.text.stable}]
        told = f"{reply.text.tokens} tokens · {talking.describe(reply, self.chat, 'en')}"
        if self.live:
            self.screen.remark(told)
        elif not by_itself:
            raise UserError(told)

    def _replies(self, asked: Conversation, cancelled: Callable[[], bool]) -> Iterator[Any]:
        """The answer as it grows; whatever goes wrong is a UserError."""
        try:
            yield from self.chat.stream(asked, self.settings, self.mixture, cancelled)
        except Exception as error:  # of any library; the conversation is worth more than the program's end
            self.screen.end(always=False)
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, UserError):
                reason = str(error)
            elif os.environ.get("ONECARD_DEBUG"):
                traceback.print_exc()
            again = " The question is not in the conversation; /retry asks it again." if self.live else ""
            raise UserError(reason + again) from None

    def clear(self, _: str) -> None:
        self.turns, self.before, self.question = [], [], ""
        self.say("A new conversation.")

    def retry(self, _: str) -> None:
        if not self.question:
            raise UserError("There is no question yet.")
        self.ask(self.question, self.before)

    def save(self, name: str) -> None:
        if not self.turns:
            raise UserError("There is nothing to save yet.")
        path = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
        if path.suffix != ".jsonl":
            raise UserError(f"/save {name}: a line of JSON would be added to it.", "Name a .jsonl file.")
        about = {
            "model": self.settings.model_path,
            "lora_path": self.settings.lora_path,
            "engine": self.chat.engine.name,
            "template": self.chat.template.name,
            "system": self.settings.system,
            "adapters": {"answer": dict(self.mixture)},
        }
        try:
            append(path, transcript.record(self.turns, self.settings, **about))
        except OSError as error:
            raise UserError(f"/save {path}: {error.strerror}.", "Name another file.") from None
        self.say(f"Saved: one more line in {path}")

    def adapter(self, rest: str) -> None:
        names = self.chat.engine.adapters
        if rest:
            mixture = () if rest == BASE else tuple(weighted(word) for word in rest.split())
            twice = {name for name, _ in mixture if [other for other, _ in mixture].count(name) > 1}
            if twice:
                raise UserError(f"/adapter {rest}: {', '.join(sorted(twice))} is there twice.")
            self.chat.engine.check_mixture(mixture)
            self.mixture = mixture
        active = " + ".join(f"{name} (weight {weight:g})" for name, weight in self.mixture)
        self.say(f"answers: {active or 'the base model'}; loaded: {', '.join([BASE, *names])}")

    def params(self, rest: str) -> None:
        fields = {field.name: field for field in dataclasses.fields(Generation)}
        shown = list(fields)
        if rest in fields:
            shown = [rest]
        elif rest:
            given: dict[str, Any] = assignments(rest)
            shown = list(given)
            for name in fields.keys() & given.keys():
                if fields[name].default is None and given[name].lower() == NONE:
                    given[name] = None
            try:
                made = parsing.build(Generation, given, "/params")
            except UserError as error:
                raise UserError(error.problem, "/params lists all.") from None
            if made.mode in self.chat.engine.cannot and "mode" in given:
                raise UserError(f"--mode {made.mode}: {self.chat.engine.cannot[made.mode][0]}.")
            new = {name: getattr(made, name) for name in given}
            self.settings = dataclasses.replace(self.settings, **new)
        idle = self.chat.unused(self.settings.mode)
        for name in shown:
            value = getattr(self.settings, name)
            text = NONE if value is None else repr(value) if value == "" else value
            self.say(f"{name:<22}{text}" + (f"  (does nothing now: {idle[name][0]})" if name in idle else ""))

    def system(self, text: str) -> None:
        if self.chat.template.system is None:
            raise UserError(self._no_system())
        if text:
            system = "" if text == NONE else text
            self.settings = dataclasses.replace(self.settings, system=system)
        self.say(f"system prompt: {self.settings.system or NONE}")

    def help(self, _: str) -> None:
        for name, (_, arguments, what) in COMMANDS.items():
            self.say(f"/{name} {arguments}".ljust(40) + what)
        self.say(f"{'/exit':<40}leave, as Ctrl-D does")

    def _no_system(self) -> str:
        return f"the template {self.chat.template.name} has no place for a system prompt."


Command = tuple[Callable[[Session, str], None], str, str]  # what it does, its arguments, its help
COMMANDS: dict[str, Command] = {
    "clear": (Session.clear, "", "begin a new conversation"),
    "retry": (Session.retry, "", "answer the last question again"),
    "save": (Session.save, "[FILE.jsonl]", "add the conversation and its options to a file"),
    "adapter": (Session.adapter, f"[{BASE} | NAME | NAME:0.5 OTHER:0.5]", "which adapters answer"),
    "params": (Session.params, "[NAME VALUE | NAME=VALUE ...]", "options of the next answers"),
    "system": (Session.system, f"[TEXT | {NONE}]", "the system prompt"),
    "help": (Session.help, "", "this list"),
}


@contextlib.contextmanager
def stoppable(live: bool) -> Iterator[Callable[[], bool]]:
    """Ctrl-C asks the answer to end; other keys wait for the prompt, unseen so that nothing is drawn over."""
    if not live:
        yield lambda: False
        return
    pressed: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    keyboard = termios.tcgetattr(sys.stdin)
    flags = keyboard[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, [*keyboard[:3], flags, *keyboard[4:]])
    try:
        yield lambda: bool(pressed)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, keyboard)
        signal.signal(signal.SIGINT, handler)


def weighted(word: str) -> tuple[str, float]:
    """An adapter and its weight of NAME or NAME:WEIGHT."""
    name, colon, number = word.rpartition(":")
    if not colon:
        return word, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(number)):
            return name, weight
    raise UserError(f"/adapter {word}: {number!r} is no weight.", "Write NAME:0.5.")


def assignments(text: str) -> dict[str, str]:
    """Values by name, of `NAME VALUE` or `NAME=VALUE NAME=VALUE`."""
    if re.match(r"\w+\s*=", text):
        parts = [part.partition("=") for part in re.split(r"\s+(?=\w+\s*=)", text)]
        return {name.strip(): value.strip() for name, _, value in parts}
    name, *value = text.split(maxsplit=1)
    return {name: " ".join(value)}


def append(path: Path, line: str) -> None:
    """Add a line to a file, on a line of its own even when the last one was cut off."""
    with open(path, "ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        file.write((b"" if file.read(1) in (b"", b"\n") else b"\n") + line.encode("utf-8", "replace"))


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


def editor() -> Callable[[], str]:
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
        completer=WordCompleter([*(f"/{name}" for name in COMMANDS), "/exit"], sentence=True),
        complete_while_typing=False,
        key_bindings=keys,
        multiline=True,
        prompt_continuation="  ",
        enable_suspend=True,
    )
    return lambda: line.prompt("> ")
