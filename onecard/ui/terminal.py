"""A chat in a terminal or through a pipe: questions in, answers as they grow, and commands.

With a terminal at both ends, lines can be edited and an answer is drawn while it may still change. Otherwise
each line is a question and only answers are printed, so that it works in scripts. The Chat is handed in.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from onecard.config import options as config_options
from onecard.config.chat import TURNS_ONLY, ChatConfig
from onecard.config.generation import BASE, TRAINED, ActiveAdapters, Generation
from onecard.data import template as templates
from onecard.data.conversation import Conversation
from onecard.errors import UserError
from onecard.inference import transcript
from onecard.inference.chat import Chat, Reply
from onecard.inference.decoding import END, LENGTH, STOP
from onecard.inference.transcript import LEFT, RIGHT, Turns
from onecard.ui import status as ui_status
from onecard.ui import terminal_io
from onecard.ui.terminal_io import Screen, in_terminal, tell

WELCOME = (
    "Enter sends, Alt-Enter or a last \\ goes on; /help lists commands; Ctrl-C stops an answer, Ctrl-D ends."
)
HELP = 48  # columns before what a command does
NONE, AS_TRAINED = "none", "trained"


def talk(chat: Chat, settings: ChatConfig, single_turn: bool = False) -> None:
    """Talk until /exit or the end of the input; single_turn: every question begins a new conversation.

    Through a pipe it raises UserError at the end when questions got no answer.
    """
    session = Session(chat, settings, single_turn)
    if session.live:
        tell(WELCOME)
    with contextlib.suppress(AttributeError):  # stand-ins for streams
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")
    read = terminal_io.plain_line
    if session.live:
        from onecard.ui import line_editor  # pipes need no prompt_toolkit

        read = line_editor.editor([*COMMANDS, "exit"])
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
                tell("Ctrl-C stops an answer; /exit or Ctrl-D leaves.")
    except BrokenPipeError:  # the reader, such as head, has all it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if session.failed and not session.live:
        raise UserError(f"{session.failed} of {session.taken} lines failed.")


class Session:
    """A conversation, its settings, and what the commands do to them."""

    def __init__(self, chat: Chat, settings: ChatConfig, single_turn: bool):
        self.chat, self.settings, self.single_turn = chat, settings, single_turn
        self.live = in_terminal()
        self.screen = Screen(self.live and os.environ.get("TERM", "dumb") != "dumb")
        self.active_adapters: ActiveAdapters = chat.active_adapters
        self.form = TRAINED  # name of the template
        self.turns: Turns = []
        self.before: Turns = []  # turns before the last question, which /retry asks again
        self.question = self.input = ""  # input: of a turn that a window had saved
        self.taken = self.failed = 0  # lines
        if settings.system and not self._has_system():
            tell(f"--system: {self._no_system()}")
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
                known = " ".join(f"/{name}" for name in [*COMMANDS, "exit"])
                raise UserError(f"/{name} is no command.", f"Known: {known}; // begins a message with a /.")
            else:
                COMMANDS[name][0](self, rest)
        except UserError as error:
            self.failed += 1
            tell(f"error: {error}")
        return True

    def ask(self, question: str, before: Turns, about: str = "") -> None:
        """Print the answer to a question behind these turns; without one the conversation stays as it was."""
        self.question, self.before, self.input = question, before, about
        turn = {"question": question, **({"input": about} if about else {})}
        asked = transcript.conversation([*before, turn], self.settings.system)
        reply = None
        with terminal_io.stoppable(self.live) as cancelled:
            for reply in self._replies(asked, cancelled):
                begun = reply.text.tokens or reply.finished
                behind = reply.text.open if begun else f"reading {reply.read}/{reply.prompt_tokens} tokens"
                self.screen.show(reply.text.stable, behind)
        self.screen.end()
        assert reply is not None, "Chat.stream ends with a finished reply"
        by_itself = reply.finished in (END, STOP, LENGTH)
        if by_itself or reply.text.stable:
            settings = (
                dataclasses.replace(self.settings, seed=reply.seed)
                if reply.seed is not None
                else self.settings
            )
            how = transcript.made_by(self.chat, settings, {LEFT: self.active_adapters}, self.form)
            self.turns = [*before, {**turn, LEFT: reply.text.stable, **how}]
        told = f"{reply.text.tokens} tokens · {ui_status.describe(reply, self.chat, 'en')}"
        if self.live:
            self.screen.remark(told)
        elif not by_itself:
            raise UserError(told)

    def _replies(self, asked: Conversation, cancelled: Callable[[], bool]) -> Iterator[Reply]:
        """The answer as it grows; whatever goes wrong is a UserError."""
        try:
            yield from self.chat.stream(asked, self.settings, self.active_adapters, cancelled, self.form)
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
        tell("A new conversation.")

    def retry(self, _: str) -> None:
        if not self.question:
            raise UserError("There is no question yet.")
        self.ask(self.question, self.before, self.input)

    def save(self, name: str) -> None:
        if not self.turns:
            raise UserError("There is nothing to save yet.")
        path = at_home(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl"))
        if path.suffix != ".jsonl":
            raise UserError(f"/save {name}: a line of JSON would be added to it.", "Name a .jsonl file.")
        how = (self.settings, {LEFT: self.active_adapters}, self.form)
        line = transcript.record(
            self.turns, self.settings, self.chat, *how, system=self.settings.system, context=""
        )
        try:
            append(path, line)
        except OSError as error:
            raise UserError(f"/save {path}: {error.strerror}.", "Name another file.") from None
        tell(f"Saved: one more line in {path}")

    def load(self, name: str) -> None:
        if not name:
            raise UserError("/load needs a file.", "Name a saved chat: /load FILE.jsonl.")
        try:
            read = transcript.load(at_home(name))
        except (OSError, ValueError) as error:  # the latter of a name that holds a NUL
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"/load {name}: {reason}.", "Name a saved chat.") from None
        saved, notes = transcript.fitted(read, self.chat)
        options = dataclasses.asdict(saved.options)
        self.active_adapters = saved.adapters_by_side.get(LEFT, self.active_adapters)
        self.form = self.form if saved.template is None else saved.template
        system = saved.texts["system"]
        if system and not self._has_system():
            notes.append((f"the system prompt is left out: {self._no_system()}", ""))
            system = ""
        if saved.texts["context"]:
            notes.append(("the context box is left out: a terminal has none", ""))
        if RIGHT in saved.adapters_by_side:
            notes.append(("a terminal compares nothing: the first of two adapters answers", ""))
        self.settings = dataclasses.replace(self.settings, **options, system=system)
        self.turns, self.before, self.question = saved.turns, saved.turns[:-1], ""
        if saved.turns:
            self.question, self.input = saved.turns[-1]["question"], saved.turns[-1].get("input", "")
        count = len(saved.turns)
        tell(f"Loaded: {count} turn{'s' * (count != 1)}, options, adapters and template.")
        for note, _ in notes:
            tell(f"not as saved: {note}")

    def template(self, name: str) -> None:
        if name:
            wanted = TRAINED if name == AS_TRAINED else name
            self.chat.template_of(wanted)
            self.form = wanted
            if self.settings.system and not self._has_system():
                self.settings = dataclasses.replace(self.settings, system="")
                tell(f"the system prompt is gone: {self._no_system()}")
        how = f" ({AS_TRAINED})" if self.form == TRAINED else ""
        shown = self.chat.template_of(self.form).name
        tell(f"template: {shown}{how}; known: {', '.join([AS_TRAINED, *templates.names()])}")

    def adapter(self, rest: str) -> None:
        names = self.chat.engine.adapters
        if rest:
            active_adapters = () if rest == BASE else tuple(weighted(word) for word in rest.split())
            twice = {
                name for name, _ in active_adapters if [other for other, _ in active_adapters].count(name) > 1
            }
            if twice:
                raise UserError(f"/adapter {rest}: {', '.join(sorted(twice))} is there twice.")
            self.chat.engine.check_active_adapters(active_adapters)
            self.active_adapters = active_adapters
        active = " + ".join(f"{name} (weight {weight:g})" for name, weight in self.active_adapters)
        tell(f"answers: {active or 'the base model'}; loaded: {', '.join([BASE, *names])}")

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
                made = config_options.build(Generation, given, "/params")
            except UserError as error:
                raise UserError(error.problem, "/params lists all.") from None
            if "mode" in given:
                self.chat.check_mode(made.mode)
            new = {name: getattr(made, name) for name in given}
            self.settings = dataclasses.replace(self.settings, **new)
        idle = self.chat.unused(self.settings.mode)
        if self.single_turn:
            idle |= dict.fromkeys(TURNS_ONLY, ("each question is a conversation of its own", ""))
        for name in shown:
            value = getattr(self.settings, name)
            text = NONE if value is None else repr(value) if value == "" else value
            tell(f"{name:<22}{text}" + (f"  (does nothing now: {idle[name][0]})" if name in idle else ""))

    def system(self, text: str) -> None:
        if not self._has_system():
            raise UserError(self._no_system())
        if text:
            system = "" if text == NONE else text
            self.settings = dataclasses.replace(self.settings, system=system)
        tell(f"system prompt: {self.settings.system or NONE}")

    def help(self, _: str) -> None:
        for name, (_, arguments, what) in COMMANDS.items():
            tell(f"/{name} {arguments}".ljust(HELP) + what)
        tell("/exit".ljust(HELP) + "leave, as Ctrl-D does")

    def _has_system(self) -> bool:
        return self.chat.template_of(self.form).system is not None

    def _no_system(self) -> str:
        return f"the template {self.chat.template_of(self.form).name} has no place for a system prompt."


Command = tuple[Callable[[Session, str], None], str, str]  # what it does, its arguments, its help
COMMANDS: dict[str, Command] = {
    "clear": (Session.clear, "", "begin a new conversation"),
    "retry": (Session.retry, "", "answer the last question again"),
    "save": (Session.save, "[FILE.jsonl]", "add the conversation and its options to a file"),
    "load": (Session.load, "FILE.jsonl", "take up the last conversation in a file, with its options"),
    "adapter": (Session.adapter, f"[{BASE} | NAME | NAME:0.5 OTHER:0.5]", "which adapters answer"),
    "params": (Session.params, "[NAME VALUE | NAME=VALUE ...]", "options of the next answers"),
    "template": (Session.template, f"[{AS_TRAINED} | NAME]", "the prompt template of the next answers"),
    "system": (Session.system, f"[TEXT | {NONE}]", "the system prompt"),
    "help": (Session.help, "", "this list"),
}


def weighted(word: str) -> tuple[str, float]:
    """An adapter and its weight of NAME or NAME:WEIGHT."""
    name, colon, number = word.rpartition(":")
    if not colon:
        return word, 1.0
    with contextlib.suppress(ValueError):
        if math.isfinite(weight := float(number)):
            return name, weight
    raise UserError(f"/adapter {word}: {number!r} is no weight.", "Write NAME:0.5.")


def at_home(name: str) -> Path:
    """A path that may begin with ~; that of nobody is a name like any other."""
    with contextlib.suppress(RuntimeError):
        return Path(name).expanduser()
    return Path(name)


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
