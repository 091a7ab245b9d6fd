"""Tests of the chat in a terminal and through a pipe: its output, its commands, Ctrl-C and the entry."""

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from wcwidth import wcwidth

from onecard import errors
from onecard.config.chat import ChatConfig
from onecard.config.generation import Generation
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from onecard.errors import UserError
from onecard.inference import chat, decoding, transcript, transformers_engine
from onecard.inference.detokenizer import PartialText
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.ui import line_editor, terminal, terminal_commands
from onecard.ui.terminal_io import Screen, visible
from tests.support.chat_fakes import NO_SYSTEM, Scripted, echo, reply
from tests.support.paths import ROOT
from tests.support.pty_session import READY, Pty

SETTINGS = ChatConfig(mode="sample", max_new_tokens=20)


@pytest.fixture
def piped(monkeypatch, capsys):
    """Return a function that runs `talk` on piped lines and returns the answers, the notes and the error."""

    def call(partner, lines: str, settings: ChatConfig = SETTINGS, **options) -> tuple[str, str, str]:
        monkeypatch.setattr(
            sys,
            "stdin",
            io.TextIOWrapper(io.BytesIO(lines.encode("utf-8", "surrogateescape")), encoding="utf-8"),
        )
        capsys.readouterr()
        problem = ""
        try:
            terminal.talk(partner, settings, **options)
        except UserError as error:
            problem = str(error)
        return (*capsys.readouterr(), problem)

    return call


def test_a_pipe_gets_answers_and_nothing_else(piped):
    """Each line but a blank one is a question of one conversation, which ends with the input."""
    scripted = Scripted(echo)
    assert piped(scripted, "one thing\r\n\n  \nand more") == ("ONE THING\nAND MORE\n", "", "")
    assert scripted.questions == [["one thing"], ["one thing", "ONE THING", "and more"]]


def test_single_turn_begins_anew_each_time(piped):
    """Every question is the first one of a new conversation."""
    scripted = Scripted(echo)
    piped(scripted, "a\nb\n", single_turn=True)
    assert scripted.questions == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("lines", "questions"),
    [
        ("a\\\nb\nc\n", ["a\nb", "c"]),
        ("a\\\n\\\nb\n", ["a\n\nb"]),
        ("a\\\n", ["a"]),
        ("//home is where\n", ["/home is where"]),
        ("a /clear\n", ["a /clear"]),
    ],
)
def test_lines_become_messages(piped, lines, questions):
    """A backslash at the end joins the next line, and // stands for a slash."""
    scripted = Scripted(echo)
    answers, notes, problem = piped(scripted, lines, single_turn=True)
    assert [texts[0] for texts in scripted.questions] == questions
    assert (notes, problem) == ("", "")
    assert answers == "".join(f"{question.upper()}\n" for question in questions)


def test_clear_and_retry(piped):
    """/clear empties the conversation; /retry asks the last question again with the turns before it."""
    scripted = Scripted(echo)
    answers, notes, problem = piped(scripted, "/retry\na\nb\n/retry\n/retry\nc\n/clear\n/retry\nd\n")
    history = ["a", "A", "b"]
    assert scripted.questions == [["a"], history, history, history, [*history, "B", "c"], ["d"]]
    assert answers == "A\nB\nB\nB\nC\nD\n"
    assert notes.count("There is no question yet") == 2
    assert problem == "2 of 9 lines failed."


def test_failed_questions_are_left_out(piped, monkeypatch):
    """Any error is reported in one line, and the conversation goes on without the question."""

    def fails_at(conversation: Conversation) -> Iterator[PartialText]:
        yield PartialText("half", tokens=1)
        if conversation.turns[-1].text == "long":
            raise UserError("Your message has 9 tokens, 8 fit.", "Shorten it.")
        if conversation.turns[-1].text == "bad":
            raise ValueError("broken\nin two lines")
        yield from echo(Conversation((Turn("user", f"half {conversation.turns[-1].text}"),)))

    def answer(conversation: Conversation) -> Iterator[PartialText]:
        return (
            dataclasses.replace(text, stable=text.stable.replace("HALF", "half"))
            for text in fails_at(conversation)
        )

    scripted = Scripted(answer)
    answers, notes, problem = piped(scripted, "a\nlong\nbad\n/retry\nb\n")
    assert scripted.questions[-1] == ["a", "half A", "b"]
    assert scripted.questions[-2] == ["a", "half A", "bad"]
    assert answers == "half A\nhalf\nhalf\nhalf\nhalf B\n"
    lines = notes.splitlines()
    assert lines[0] == "error: Your message has 9 tokens, 8 fit. Shorten it."
    assert lines[1:] == ["error: ValueError: broken in two lines"] * 2
    assert problem == "3 of 5 lines failed."
    monkeypatch.setenv("ONECARD_DEBUG", "1")
    assert "Traceback" in piped(scripted, "bad\n")[1]


def test_failed_retry_keeps_the_answer_that_was_there(piped):
    """A retry that fails leaves the earlier answer in the conversation."""
    answers = iter([True, False, True])

    def sometimes(conversation: Conversation) -> Iterator[PartialText]:
        if not next(answers):
            raise RuntimeError("no")
        return echo(conversation)

    scripted = Scripted(sometimes)
    piped(scripted, "a\n/retry\nb\n")
    assert scripted.questions[-1] == ["a", "A", "b"]


@pytest.mark.parametrize(("text", "kept"), [("half", ["a", "half", "b"]), ("", ["b"])])
def test_out_of_memory_keeps_what_is_there(piped, text, kept):
    """The user is told; a partial answer stays in the conversation, and a question without any is removed."""

    def runs_out(conversation: Conversation) -> Iterator[PartialText]:
        yield PartialText(text, tokens=len(text), finished=decoding.NO_MEMORY)

    scripted = Scripted(runs_out)
    answers, notes, problem = piped(scripted, "a\nb\n")
    assert answers == f"{text}\n" * 2
    assert notes.count("out of memory") == 2
    assert problem == "2 of 2 lines failed."
    assert scripted.questions[1] == kept


def test_adapters(piped):
    """/adapter takes one adapter, the base or several with weights; a wrong argument changes nothing."""
    scripted = Scripted(echo)
    lines = ["/adapter", "/adapter two", "/adapter base", "/adapter one:0.5 two:-0.25", "/adapter three"]
    lines += ["/adapter one:x", "/adapter one:nan", "/adapter one one:2"]
    _, notes, problem = piped(scripted, "".join(f"{line}\n{number}\n" for number, line in enumerate(lines)))
    half = (("one", 0.5), ("two", -0.25))
    choices = [active_adapters for _, _, active_adapters in scripted.asked]
    assert choices == [(("one", 1.0),), (("two", 1.0),), (), *[half] * 5]
    messages = notes.splitlines()
    assert messages[0] == "active: one (weight 1); loaded: base, one, two"
    assert messages[2] == "active: the base model alone; loaded: base, one, two"
    assert messages[3] == "active: one (weight 0.5) + two (weight -0.25); loaded: base, one, two"
    assert [line.split(".")[0] for line in messages[4:]] == [
        "error: No adapter is called three",
        "error: /adapter one:x: 'x' is not a weight",
        "error: /adapter one:nan: 'nan' is not a weight",
        "error: /adapter one one:2: one is named twice",
    ]
    assert problem == "4 of 16 lines failed."


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("temperature 0.3", {"temperature": 0.3}),
        ("temperature=0.3 top_k=20", {"temperature": 0.3, "top_k": 20}),
        ("temperature = 0.3  top_k = 20", {"temperature": 0.3, "top_k": 20}),
        (r"stop END OF=\nTEXT|x", {"stop": r"END OF=\nTEXT|x"}),
        ("stop=a b top_p=1", {"stop": "a b", "top_p": 1.0}),
        ("stop=", {"stop": ""}),
        ("seed 7", {"seed": 7}),
        ("seed none", {"seed": None}),
        ("mode greedy", {"mode": "greedy"}),
    ],
)
def test_params_are_set(piped, line, values):
    """Options can be written with a space or with =; the next answer uses them, and no others change."""
    scripted = Scripted(echo)
    before = dataclasses.replace(SETTINGS, seed=3, stop="x")
    _, notes, problem = piped(scripted, f"/params {line}\nq\n", before)
    assert scripted.asked[0][1] == dataclasses.replace(before, **values)
    assert [note.split()[0] for note in notes.splitlines()] == list(values)
    assert problem == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("temperature 99", "--temperature 99: must be from 0.01 to 10"),
        ("temperature=x top_k=-1", "--temperature x: must be a number; --top_k -1: must be 0 or more"),
        ("bits 4", "no option is called 'bits'"),
        ("warmth", "no option is called 'warmth'"),
        ("top_k=", "--top_k : must be a number"),
        ("mode beam", "--mode beam: toy follows one sequence: no beam search"),
        ("mode fast", "choose from greedy"),
    ],
)
def test_wrong_params_change_nothing(piped, line, words):
    """/params makes the same checks and gives the same messages as the command line."""
    scripted = Scripted(echo)
    _, notes, _ = piped(scripted, f"/params {line}\nq\n")
    assert words in notes
    assert "--help" not in notes
    assert len(notes.splitlines()) == 1
    assert scripted.asked[0][1] == SETTINGS


def test_params_are_listed_with_what_does_nothing(piped):
    """/params lists one or all options with their values, and says why one has no effect in this mode."""
    _, notes, _ = piped(Scripted(echo), "/params\n/params top_p\n/params mode greedy\n/params top_p 0.5\n")
    lines = notes.splitlines()
    names = [field.name for field in dataclasses.fields(Generation)]
    assert [line.split()[0] for line in lines] == [*names, "top_p", "mode", "top_p"]
    assert (
        lines[names.index("num_beams")].split(maxsplit=1)[1] == "4  (has no effect now: only for beam search)"
    )
    assert lines[names.index("seed")].split() == ["seed", "none"]
    assert lines[-3].split() == ["top_p", "0.9"]
    assert "0.5  (has no effect now: only for sampling)" in lines[-1]
    _, notes, _ = piped(Scripted(echo), "/params\n", single_turn=True)
    idle = [line.split()[0] for line in notes.splitlines() if "conversation of its own" in line]
    assert idle == ["max_memory", "last_turns"]


def test_system_prompt(piped):
    """A system prompt from the settings or the command begins each conversation; `none` removes it."""
    scripted = Scripted(echo)
    settings = dataclasses.replace(SETTINGS, system="Be kind.")
    _, notes, _ = piped(scripted, "a\n/system Be brief.\nb\n/system\n/system none\nc\n", settings)
    assert [texts[0] for texts in scripted.questions] == ["Be kind.", "Be brief.", "a"]
    assert notes.splitlines() == ["system prompt: Be brief."] * 2 + ["system prompt: none"]


def test_template_without_a_system_turn(piped):
    """The option and the command report it, and questions are answered without a system prompt."""
    scripted = Scripted(echo, NO_SYSTEM)
    _, notes, problem = piped(
        scripted, "a\n/system Be brief.\n", dataclasses.replace(SETTINGS, system="Be kind.")
    )
    assert scripted.questions == [["a"]]
    assert [line.count("template bare has no place") for line in notes.splitlines()] == [1, 1]
    assert problem == "1 of 2 lines failed."


def test_help_exit_and_unknown_commands(piped):
    """/help and the error for an unknown command name every command; nothing is read after /exit."""
    scripted = Scripted(echo)
    _, notes, problem = piped(scripted, "/help\n/stop\n/\n/exit\nq\n")
    *helped, unknown, empty = notes.splitlines()
    names = [*terminal_commands.COMMANDS, "exit"]
    assert [line.split()[0] for line in helped] == [f"/{name}" for name in names]
    assert unknown.startswith("error: There is no command /stop.")
    assert all(f"/{name}" in unknown for name in names)
    descriptions = [description for _, _, description in terminal_commands.COMMANDS.values()]
    assert (
        len({line.index(description) for line, description in zip(helped, descriptions, strict=False)}) == 1
    ), "one column"
    assert empty.startswith("error: There is no command /.")
    assert (scripted.asked, problem) == ([], "2 of 3 lines failed.")


def test_saved_chat_has_all_that_made_it(piped, tmp_path, monkeypatch):
    """A saved chat is one line of JSON with the turns, every option, the adapters and the system prompt."""
    monkeypatch.chdir(tmp_path)
    scripted = Scripted(
        lambda _: iter([PartialText("odd \u2028 “text” \x85 \x1b[31m\n漢", tokens=3, finished="end")])
    )
    settings = dataclasses.replace(SETTINGS, system="Be kind.", lora_path="x", auth="me:secret")
    lines = "first\n/params top_k 3\n/adapter one:0.5\nsecond\n/save my chat.jsonl\n/save\n"
    _, notes, problem = piped(scripted, lines, settings)
    assert problem == ""
    text = (tmp_path / "my chat.jsonl").read_text(encoding="utf-8")
    assert "secret" not in text
    [line] = text.removesuffix("\n").split("\n")
    saved = json.loads(line)
    options = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Generation)}
    assert saved["options"] == {**options, "top_k": 3}
    assert (saved["system"], saved["lora_path"]) == ("Be kind.", "x")
    assert (saved["template"], saved["engine"]) == ("plain", "toy")
    assert saved["adapters"] == {"answer": {"one": 0.5}}
    answer = "odd \u2028 “text” \x85 \x1b[31m\n漢"
    texts = [{key: turn[key] for key in ("question", "answer")} for turn in saved["turns"]]
    assert texts == [{"question": q, "answer": answer} for q in ("first", "second")]
    assert [turn["adapters"]["answer"] for turn in saved["turns"]] == [{"one": 1.0}, {"one": 0.5}]
    assert [turn["options"]["top_k"] for turn in saved["turns"]] == [settings.top_k, 3]
    assert [turn["options"]["seed"] for turn in saved["turns"]] == [11, 11]  # the seed that was drawn
    [file] = set(tmp_path.glob("chat-*.jsonl"))
    assert re.fullmatch(r"chat-\d{8}-\d{6}\.jsonl", file.name)
    assert file.name in notes


def test_saving_adds_and_never_overwrites(piped, tmp_path):
    """Two saves add two lines to a file, even when its last line has no newline at the end."""
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b'{"mine": 1}')
    piped(Scripted(echo), f"a\n/save {path}\nb\n/save {path}\n")
    mine, *saved = path.read_text(encoding="utf-8").splitlines()
    assert mine == '{"mine": 1}'
    assert [len(json.loads(line)["turns"]) for line in saved] == [1, 2]
    read = transcript.read(path.read_text(encoding="utf-8"))
    assert [turn["answer"] for turn in read.turns] == ["A", "B"]
    assert read.options.max_new_tokens == 20


def test_a_saved_chat_is_taken_up_again(piped, tmp_path):
    """/load restores turns, options, weights, template and system prompt; /retry works after it."""
    path = tmp_path / "chats.jsonl"
    settings = dataclasses.replace(SETTINGS, system="Be kind.")
    piped(Scripted(echo), f"a\n/params top_k 3\n/adapter two:0.5\nb\n/save {path}\n", settings)
    scripted = Scripted(echo)
    _, notes, problem = piped(scripted, f"/load {path}\n/retry\nc\n")
    assert (notes, problem) == ("Loaded: 2 turns, options, adapters and template.\n", "")
    assert scripted.questions == [["Be kind.", "a", "A", "b"], ["Be kind.", "a", "A", "b", "B", "c"]]
    for _, options, active_adapters in scripted.asked:
        assert (options.top_k, options.max_new_tokens, active_adapters) == (3, 20, (("two", 0.5),))
    piped(Scripted(echo), f"/template alpaca\na\n/save {path}\n")
    scripted = Scripted(echo)
    piped(scripted, f"/load {path}\nb\n")
    assert scripted.template_names == ["alpaca"]


def test_retry_of_a_loaded_turn_has_its_input(piped, tmp_path):
    """The input of a question is used again by /retry and saved again, but not used for the next question."""
    path = tmp_path / "chats.jsonl"
    piped(Scripted(echo), f"a\n/save {path}\n")
    saved = json.loads(path.read_text())
    saved["turns"][0]["input"] = "about"
    path.write_text(json.dumps(saved), encoding="utf-8")
    questions = []
    scripted = Scripted(lambda conversation: questions.append(conversation.turns[-1]) or echo(conversation))
    _, _, problem = piped(scripted, f"/load {path}\n/retry\n/retry\nb\n/save {path}\n")
    assert problem == ""
    assert [(turn.text, turn.input) for turn in questions] == [("a", "about"), ("a", "about"), ("b", "")]
    turns = transcript.read(path.read_text()).turns
    assert [turn.get("input") for turn in turns] == ["about", None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapters": {"answer": {"three": 1.0}}}, "No adapter is called three. The chosen adapters stay"),
        ({"template": "gone"}, "there is no template gone here: plain stays"),
        ({"context": "x"}, "a terminal has none"),
        ({"adapters": {"answer": {"two": 1.0}, "other": {}}}, "the first of two adapters answers"),
    ],
)
def test_what_cannot_be_taken_up_is_named(piped, tmp_path, change, words):
    """What cannot be restored is reported in one line; the rest is restored."""
    path = tmp_path / "chat.jsonl"
    piped(Scripted(echo), f"a\n/params top_k 3\n/save {path}\n")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    scripted = Scripted(echo)
    _, notes, problem = piped(scripted, f"/load {path}\nb\n")
    assert (problem, len(notes.splitlines())) == ("", 2)
    assert words in notes.splitlines()[1]
    [(texts, options, active_adapters)] = scripted.asked
    assert (texts, options.top_k) == (["a", "A", "b"], 3)
    assert active_adapters == ((("two" if "two" in str(change) else "one"), 1.0),)


def test_files_that_hold_no_chat(piped, tmp_path):
    """Each of them gives one message, and the conversation stays as it was."""
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "other.jsonl").write_text('{"rows": 1}\n')
    lines = "".join(f"/load {tmp_path / name}\n" for name in ("none.jsonl", "bytes.jsonl", "other.jsonl"))
    scripted = Scripted(echo)
    _, notes, problem = piped(scripted, f"a\n{lines}/load\nb\n")
    assert problem == "4 of 6 lines failed."
    assert len(notes.splitlines()) == 4
    assert "/load needs a file." in notes
    assert "the file is not text" in notes
    assert scripted.questions[-1] == ["a", "A", "b"]


def test_templates(piped):
    """/template sets the template of the next answers; one without a system turn drops the system prompt."""
    scripted = Scripted(echo)
    settings = dataclasses.replace(SETTINGS, system="Be kind.")
    _, notes, problem = piped(scripted, "a\n/template alpaca\nb\n/template trained\nc\n/template\n", settings)
    assert (scripted.template_names, problem) == (["", "alpaca", ""], "")
    assert scripted.questions[1] == ["a", "A", "b"]
    lines = notes.splitlines()
    assert "no place for a system prompt" in lines[0]
    assert lines[1].startswith("template: alpaca; available: trained, auto, alpaca")
    assert lines[3].startswith("template: plain (trained); available: ")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("/save {0}/a.jsonl", "nothing to save"),
        ("q\n/save {0}/notes.txt", "Name a .jsonl file"),
        ("q\n/save {0}/none/a.jsonl", "No such file or directory"),
        ("q\n/save {0}/folder.jsonl", "Is a directory"),
    ],
)
def test_what_cannot_be_saved(piped, tmp_path, lines, words):
    """There is one message, and nothing is written."""
    (tmp_path / "folder.jsonl").mkdir()
    _, notes, problem = piped(Scripted(echo), lines.format(tmp_path))
    assert words in notes
    assert "1 of" in problem
    assert [path.name for path in tmp_path.rglob("*")] == ["folder.jsonl"]


# What is printed


ALPHABET = [
    *"ab  ",
    "漢",
    "字",
    "🙂",
    "é",
    "e\u0301",
    "\n",
    "\t",
    "\x1b[31m",
    "\x1b]0;t\x07",
    "\x9b2J",
    "\r",
    "\x00",
]


def growing(chance: random.Random) -> list[PartialText]:
    """A random answer as Chat.stream may give it: the open text may be replaced or removed later."""
    whole = "".join(chance.choices(ALPHABET, k=chance.randint(0, 90)))
    texts, place = [], 0
    while place < len(whole):
        place = min(len(whole), place + chance.choice([0, 0, 1, 1, 2, 9]))
        rest = whole[place:] if chance.random() < 0.5 else "".join(chance.choices(ALPHABET, k=60))
        opened = rest[: chance.randint(0, 60)] if chance.random() < 0.8 else ""
        texts.append(PartialText(whole[:place], opened, tokens=place + 1))
    reason = chance.choice(["end", "stop", "length", decoding.CANCELLED, decoding.NO_MEMORY])
    final = texts[-1].stable if texts else ""
    if texts and chance.random() < 0.3:  # this text was held back until the end
        final = whole + "tail"
    return [*texts, PartialText(final, tokens=len(final), finished=reason)]


class Glass:
    """A terminal's screen that knows line wraps, wide letters and the few sequences used; others fail."""

    def __init__(self, width: int):
        self.width, self.rows, self.row, self.column, self.saved = width, {}, 0, 0, (0, 0)

    def take(self, text: str) -> "Glass":
        while text:
            match = re.match(r"\x1b7|\x1b8|\x1b\[J|\x1b\[[02]m|[^\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
            assert match, f"a control character: {text[:9]!r}"
            text = text[match.end() :]
            self.obey(match[0])
        return self

    def obey(self, piece: str) -> None:
        if piece == "\x1b7":
            self.saved = (self.row, self.column)
        elif piece == "\x1b8":
            self.row, self.column = self.saved
        elif piece == "\x1b[J":
            erased = [place for place in self.rows if place >= (self.row, self.column)]
            for place in erased:
                del self.rows[place]
        elif piece == "\n":
            self.row, self.column = self.row + 1, 0
        elif piece == "\t":
            self.column = min(self.column // 8 * 8 + 8, self.width - 1)
        elif piece[0] != "\x1b":
            cells = wcwidth(piece)
            if cells == 0:
                cell = (self.row, self.column - 1)
                self.rows[cell] = self.rows.get(cell, "") + piece
                return
            if self.column + cells > self.width:
                self.row, self.column = self.row + 1, 0
            self.rows[self.row, self.column] = piece
            self.column += cells


@pytest.mark.parametrize("width", [9, 40])
def test_random_answers_are_drawn_exactly(monkeypatch, capsys, width):
    """At every step the screen shows the stable text and, on the same line, the beginning of the open text.
    At the end it shows the final text as if that had been printed at once, and the printed pieces join to it.
    """
    monkeypatch.setenv("COLUMNS", str(width))
    chance, screen = random.Random(width), Screen(live=True)
    for _ in range(150):
        glass, printed = Glass(width), ""
        texts = growing(chance)
        for text in texts:
            screen.show(text.stable, text.open)
            new = capsys.readouterr().out
            printed += new
            glass.take(new)
            plain = Glass(width).take(visible(text.stable))
            assert plain.rows.items() <= glass.rows.items()
            assert glass.row == plain.row
            assert (glass.column > plain.column) <= bool(text.open)
        screen.end()
        new = capsys.readouterr().out
        printed += new
        final = visible(texts[-1].stable)
        assert re.sub("\x1b7.*?\x1b8\x1b\\[J", "", printed, flags=re.S) == f"{final}\n"
        assert glass.take(new).rows == Glass(width).take(final).rows


def test_as_much_of_the_open_text_as_fits(monkeypatch, capsys):
    """The open text fills the line up to its last but one column; wide letters take two columns."""
    monkeypatch.setenv("COLUMNS", "10")
    screen = Screen(live=True)
    steps = [
        ("abc", "defghijkl"),
        ("abcd", "漢字漢字"),
        ("abcd漢", "a\nb"),
        ("abcd漢abcd", "rest"),
        ("abcd漢abcd\n", "x"),
    ]
    for stable, opened in steps:
        screen.show(stable, opened)
    drawn = re.findall("\x1b7\x1b\\[2m(.*?)\x1b\\[0m", capsys.readouterr().out)
    assert drawn == ["defghi", "漢字", "a", "x"]


def test_random_answers_join_in_a_pipe(piped):
    """Only stable text is printed, each piece once: the output is the final text and a newline."""
    chance = random.Random(0)
    answers = [growing(chance) for _ in range(300)]
    waiting = iter(answers)
    out, _, _ = piped(Scripted(lambda _: iter(next(waiting))), "q\n" * 300, single_turn=True)
    assert out == "".join(visible(texts[-1].stable) + "\n" for texts in answers)


def test_a_final_text_that_contradicts_is_printed_whole(capsys):
    """When a tokenizer decodes the whole text differently from its parts, the whole is printed once more."""
    screen = Screen(live=False)
    for stable in ("one", "one t", "One two"):
        screen.show(stable)
    screen.end()
    assert capsys.readouterr().out == "one t\nOne two\n"


def test_input_in_another_encoding(piped, monkeypatch):
    """Letters that are not UTF-8 do no harm, and the user learns why the answer is strange, once."""
    scripted = Scripted(echo)
    _, notes, problem = piped(scripted, "\udcff?\n\udcfe!\n", single_turn=True)
    assert [texts[0] for texts in scripted.questions] == ["\ufffd?", "\ufffd!"]
    assert (notes.count("PYTHONIOENCODING"), problem) == (1, "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="gbk"))
    terminal.talk(scripted, SETTINGS, single_turn=True)
    assert scripted.questions[-1] == ["你好"]


def test_output_that_has_no_such_letters(monkeypatch):
    """An answer in a terminal that is not UTF-8 is escaped where it must be, and is no error."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é漢\n".encode()), encoding="utf-8"))
    terminal.talk(Scripted(echo), SETTINGS)
    assert out.buffer.getvalue() == b"\xc9\\u6f22\n"


# A real terminal


@pytest.fixture
def shell(tmp_path):
    """Return a function that starts `talk` in its own pseudo-terminal."""
    sessions = []

    def start(partner, settings: ChatConfig = SETTINGS, **environment: str) -> Pty:
        run = lambda: terminal.talk(partner() if callable(partner) else partner, settings)  # noqa: E731
        sessions.append(Pty(run, {"ONECARD_CACHE": str(tmp_path / "cache"), **environment}))
        return sessions[-1]

    yield start
    for session in sessions:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(session.pid, signal.SIGKILL)
            os.waitpid(session.pid, 0)


def slowly(conversation: Conversation) -> Iterator[PartialText | chat.Reply]:
    """Answer slowly: `read` shows the reading of a prompt, `beams` an open part, `long` takes minutes."""
    question = conversation.turns[-1].text
    if question == "read":
        yield reply(PartialText(""), read=3)
        time.sleep(0.2)
    if question == "beams":
        yield PartialText("BE", " maybe", tokens=2)
        time.sleep(0.3)
    if question == "long":
        for count in range(1, 6000):
            yield PartialText("la " * count, tokens=count)
            time.sleep(0.02)
    if question == "fail":
        yield PartialText("begun", " perhaps", tokens=2)
        raise ValueError("no luck")
    if question == "wild":
        yield PartialText("red\x1b[31m\x1b]0;title\x07\x9b2J.", "\x1b[1mopen", tokens=3)
    yield from echo(conversation)


def test_a_session_in_a_terminal(shell, tmp_path):
    """Editing, the status line, open text, Ctrl-C in an answer and at the prompt, errors and /exit work."""
    session = shell(Scripted(slowly))
    session.see("/help lists commands")
    session.see(READY)
    session.line("hello there")
    session.see("HELLO THERE\r\n\x1b\\[2m11 tokens · .*context.*\x1b\\[0m\r\n")
    session.see(READY)
    session.line("read")
    session.see("\x1b7\x1b\\[2mreading 3/7 tokens\x1b\\[0m\x1b8\x1b\\[JREAD\r\n")
    session.see(READY)
    session.line("long")
    session.see("la la la")
    session.keys("\x03")
    session.see("\r\n\x1b\\[2m.*? · stopped\x1b\\[0m")
    assert "^C" not in session.text
    session.see(READY)
    session.line("beams")
    session.see("maybe")
    session.keys("typed ahead")
    session.see("JAMS\r\n\x1b\\[2m5 tokens .*?typed ahead")
    session.keys("\x03")
    session.see("Ctrl-D leaves")
    session.see(READY)
    session.keys("two\x1b\rlines\\\rin all\r")
    session.see("TWO\r\nLINES\r\nIN ALL\r\n")
    session.see(READY)
    session.line("fail")
    session.see("begun\x1b7\x1b\\[2m perhaps\x1b\\[0m\x1b8\x1b\\[J\r\nerror: ValueError: no luck")
    session.see(READY)
    session.line("/save " + str(tmp_path / "chat.jsonl"))
    session.see("Saved")
    session.see(READY)
    session.line("/exit")
    assert session.code() == 0
    saved = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    questions = [turn["question"] for turn in saved["turns"]]
    assert questions == ["hello there", "read", "long", "beams", "two\nlines\nin all"]
    assert re.fullmatch("(la )+", saved["turns"][2]["answer"])  # the part that was written is kept


def test_what_beams_may_still_change(shell):
    """The open part is shown dim and then erased; a model's escape sequences become harmless text."""
    session = shell(Scripted(slowly))
    session.see(READY)
    session.line("beams")
    session.see("BE\x1b7\x1b\\[2m maybe\x1b\\[0m\x1b8\x1b\\[JAMS")
    session.see(READY)
    session.line("wild")
    session.see(re.escape("red[31m]0;title2J.\x1b7\x1b[2m[1mopen\x1b[0m\x1b8\x1b[J"))
    session.see(READY)
    session.keys("\x04")
    assert session.code() == 0


OLDEST = "\x1b[A"  # the arrow key that goes back in the history and stops at the oldest entry


def test_history_and_completion(shell, tmp_path):
    """The arrow key brings back questions of an earlier session; only the owner can read their file."""
    path = tmp_path / "cache" / "chat-history"
    path.parent.mkdir()
    path.touch(mode=0o644)
    for keys in ("first question", OLDEST):
        session = shell(Scripted(echo))
        session.see(READY)
        if keys == OLDEST:
            session.press_until(keys, "question")  # the history is read in the background
        else:
            session.keys(keys)
        session.line("")
        session.see("FIRST QUESTION\r\n")
        session.see(READY)
        session.keys("/he\t")
        session.see("lp")
        session.line("")
        session.see("/clear.*begin a new conversation")
        session.see(READY)
        session.keys("\x04")
        assert session.code() == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().count("+first question") == 2


def test_history_that_cannot_be_kept(monkeypatch, tmp_path):
    """A new file has mode 0600 whatever the umask; where none can be written, the history stays in memory."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "new" / "cache"))
    umask = os.umask(0)
    try:
        history = line_editor.history()
    finally:
        os.umask(umask)
    path = tmp_path / "new" / "cache" / "chat-history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.mkdir()
    history.append_string("no place for it")
    monkeypatch.setenv("ONECARD_CACHE", "/dev/null/cache")
    assert isinstance(line_editor.history(), line_editor.InMemoryHistory)


def test_a_terminal_without_escapes(shell):
    """With TERM=dumb only stable text and plain remarks are printed, and nothing is erased."""
    session = shell(Scripted(slowly), TERM="dumb")
    session.see("> $")
    session.line("beams")
    session.see("BEAMS\r\n5 tokens.*> $")
    session.line("/exit")
    assert session.code() == 0
    assert not re.search("\x1b(7|8|\\[2m|\\[J)", session.text)


def test_ctrl_c_stops_a_real_answer(shell, tiny_model):
    """Ctrl-C stops a long answer of a tiny Llama; after another answer and /exit the exit code is 0."""

    def tiny_chat() -> chat.Chat:
        session = real_chat(tiny_model)
        scores = session.engine.scores

        def slow(*arguments):  # 400 tokens take at least eight seconds
            time.sleep(0.02)
            return scores(*arguments)

        session.engine.scores = slow
        return session

    settings = ChatConfig(mode="sample", seed=1, max_new_tokens=400, min_new_tokens=400)
    session = shell(tiny_chat, settings)
    session.see(READY, 60)
    session.line("Say red")
    session.see("2004l.{20}")  # twenty letters of the answer
    session.keys("\x03")
    stopped = session.see("\x1b\\[2m(\\d+) tokens · .* · stopped\x1b\\[0m")
    assert 0 < int(stopped[1]) < 400
    session.see(READY)
    session.line("/params max_new_tokens=5 min_new_tokens=5 mode=beam")
    session.see(READY)
    session.line("Say blue")
    session.see(
        "\x1b\\[2m5 tokens · .* tokens/s · first token after .*/ 512 context tokens.*ended at the limit"
    )
    session.see(READY)
    session.line("/exit")
    assert session.code() == 0


def real_chat(folder: Path) -> chat.Chat:
    tokenizer = models_tokenizer.load_tokenizer(str(folder))
    model = base_model.load_base(str(folder), 16, "fp32", "cpu").eval()
    engine = transformers_engine.Engine(model, tokenizer, 512)
    return chat.Chat(engine, tokenizer, data_template.load("alpaca", tokenizer))


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_pipe_to_a_real_model(piped, tiny_model, mode):
    """Each line is the last reply of Chat.stream; the second question has the first in its conversation."""
    partner = real_chat(tiny_model)
    settings = ChatConfig(mode=mode, max_new_tokens=12)
    out, notes, problem = piped(partner, "Say red\nSay blue\n", settings)
    turns, expected = (), ""
    for question in ("Say red", "Say blue"):
        turns = (*turns, Turn("user", question))
        *_, last = partner.stream(Conversation(turns), settings)
        turns = (*turns, Turn("assistant", last.text.stable))
        expected += visible(last.text.stable) + "\n"
    assert (out, notes, problem) == (expected, "", "")


def test_ctrl_c_ends_a_pipe(piped):
    """In a script Ctrl-C ends the whole program."""

    def interrupted(_: Conversation) -> Iterator[PartialText]:
        yield PartialText("a", tokens=1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        piped(Scripted(interrupted), "q\n")


def test_reader_that_has_enough(tmp_path):
    """`| head -1` ends the program quietly."""
    lines = tmp_path / "lines"
    lines.write_text("question\n" * 20000, encoding="utf-8")
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for number, place in ((os.open(lines, os.O_RDONLY), 0), (writer, 1), (writer, 2)):
                os.dup2(number, place)
            os.close(reader)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            errors.run_program(lambda: terminal.talk(Scripted(echo), SETTINGS, single_turn=True))
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        assert pipe.readline() == b"QUESTION\n"
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# The entry


@pytest.fixture
def entry(tmp_path):
    """Return a function that runs cpu_chat.sh with a python that prints its arguments, and returns those."""
    for name in ("cpu_chat.sh", "tools/launch.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "tools" / "setup.sh").write_text('test "$1" = cpu\n', encoding="utf-8")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)

    def call(*arguments: str, **environment: str) -> list[str]:
        variables = {**os.environ, **environment}
        command = ["bash", str(tmp_path / "cpu_chat.sh"), *arguments]
        settings = {"cwd": tmp_path, "capture_output": True, "text": True, "check": True}
        ended = subprocess.run(command, env=variables, **settings)
        program, *rest = ended.stdout.splitlines()
        assert program == str(tmp_path / "tools/cpu_chat.py")
        return rest

    return call


def test_entry_takes_the_demo_adapter_when_nothing_else_is_named(entry, tmp_path):
    """The entry adds the demo adapter unless a model or an adapter is named; all flags are passed on."""
    assert entry() == []
    (tmp_path / "lora-checkpoints" / "demo").mkdir(parents=True)
    demo = ["--lora_path", "lora-checkpoints/demo"]
    assert entry() == demo
    assert entry("--system", "two words") == [*demo, "--system", "two words"]
    assert entry("--lora_path", "x") == ["--lora_path", "x"]
    assert entry("--model_path=x") == ["--model_path=x"]
    assert entry("--config", "x") == ["--config", "x"]
    assert entry(BASE_MODEL="x") == ["--model_path", "x"]
    assert entry(MODEL_PATH="x", LORA_PATH="y z") == ["--model_path", "x", "--lora_path", "y z"]


def test_program_is_for_llama_cpp_unless_told_otherwise():
    """--help works without a model and names the engine."""
    command = [sys.executable, "-X", "importtime", "tools/cpu_chat.py", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[llama.cpp; execution]" in " ".join(ended.stdout.split())
    assert "torch" not in ended.stderr
