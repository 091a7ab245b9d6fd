"""Talking in a terminal and through a pipe: what is printed and drawn, the commands, Ctrl-C, the entry."""

import contextlib
import dataclasses
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
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

SETTINGS = ChatConfig(mode="sample", max_new_tokens=20)


@pytest.fixture
def piped(monkeypatch, capsys):
    """Runs `talk` on lines through a pipe: (answers, notes, the error at its end)."""

    def call(made, lines: str, settings: ChatConfig = SETTINGS, **how) -> tuple[str, str, str]:
        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode("utf-8", "surrogateescape")))
        )
        capsys.readouterr()
        problem = ""
        try:
            terminal.talk(made, settings, **how)
        except UserError as error:
            problem = str(error)
        return (*capsys.readouterr(), problem)

    return call


def test_a_pipe_gets_answers_and_nothing_else(piped):
    """A line is a question, blank ones are none; turns follow one another; the end of the input ends it."""
    made = Scripted(echo)
    assert piped(made, "one thing\r\n\n  \nand more") == ("ONE THING\nAND MORE\n", "", "")
    assert made.questions == [["one thing"], ["one thing", "ONE THING", "and more"]]


def test_single_turn_begins_anew_each_time(piped):
    """Every question is the first of a conversation."""
    made = Scripted(echo)
    piped(made, "a\nb\n", single_turn=True)
    assert made.questions == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("lines", "questions"),
    [
        ("a\\\nb\nc\n", ["a\nb", "c"]),
        ("a\\\n\\\nb\n", ["a\n\nb"]),
        ("a\\\n", ["a"]),
        ("//home is where\n", ["/home is where"]),
        ("a /clear\n", ["a /clear"]),
        ("\udcff?\n", ["\ufffd?"]),
    ],
)
def test_lines_become_messages(piped, lines, questions):
    """A backslash goes on with the next line, // begins a message with a slash, bad bytes do no harm."""
    made = Scripted(echo)
    answers, notes, problem = piped(made, lines, single_turn=True)
    assert [texts[0] for texts in made.questions] == questions
    assert (notes, problem) == ("", "")
    assert answers == "".join(f"{question.upper()}\n" for question in questions)


def test_clear_and_retry(piped):
    """/clear forgets; /retry asks the last question on what came before it, also after /clear's refusal."""
    made = Scripted(echo)
    answers, notes, problem = piped(made, "/retry\na\nb\n/retry\n/retry\nc\n/clear\n/retry\nd\n")
    history = ["a", "A", "b"]
    assert made.questions == [["a"], history, history, history, [*history, "B", "c"], ["d"]]
    assert answers == "A\nB\nB\nB\nC\nD\n"
    assert notes.count("There is no question yet") == 2
    assert problem == "2 of 9 lines failed."


def test_failed_questions_are_left_out(piped, monkeypatch):
    """A UserError or any other error is one line; the conversation goes on without the question."""

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

    made = Scripted(answer)
    answers, notes, problem = piped(made, "a\nlong\nbad\n/retry\nb\n")
    assert made.questions[-1] == ["a", "half A", "b"]
    assert made.questions[-2] == ["a", "half A", "bad"]
    assert answers == "half A\nhalf\nhalf\nhalf\nhalf B\n"
    lines = notes.splitlines()
    assert lines[0] == "error: Your message has 9 tokens, 8 fit. Shorten it."
    assert lines[1:] == ["error: ValueError: broken in two lines"] * 2
    assert problem == "3 of 5 lines failed."
    monkeypatch.setenv("ONECARD_DEBUG", "1")
    assert "Traceback" in piped(made, "bad\n")[1]


def test_failed_retry_keeps_the_answer_that_was_there(piped):
    """A second try that fails changes nothing."""
    answers = iter([True, False, True])

    def sometimes(conversation: Conversation) -> Iterator[PartialText]:
        if not next(answers):
            raise RuntimeError("no")
        return echo(conversation)

    made = Scripted(sometimes)
    piped(made, "a\n/retry\nb\n")
    assert made.questions[-1] == ["a", "A", "b"]


@pytest.mark.parametrize(("text", "kept"), [("half", ["a", "half", "b"]), ("", ["b"])])
def test_out_of_memory_keeps_what_is_there(piped, text, kept):
    """The partial answer stays in the conversation, the user is told; without one the question goes."""

    def runs_out(conversation: Conversation) -> Iterator[PartialText]:
        yield PartialText(text, tokens=len(text), finished=decoding.NO_MEMORY)

    made = Scripted(runs_out)
    answers, notes, problem = piped(made, "a\nb\n")
    assert answers == f"{text}\n" * 2
    assert notes.count("out of memory") == 2
    assert problem == "2 of 2 lines failed."
    assert made.questions[1] == kept


def test_adapters(piped):
    """One, the base, several with weights; what is not there or no weight changes nothing."""
    made = Scripted(echo)
    lines = ["/adapter", "/adapter two", "/adapter base", "/adapter one:0.5 two:-0.25", "/adapter three"]
    lines += ["/adapter one:x", "/adapter one:nan", "/adapter one one:2"]
    _, notes, problem = piped(made, "".join(f"{line}\n{number}\n" for number, line in enumerate(lines)))
    half = (("one", 0.5), ("two", -0.25))
    choices = [active_adapters for _, _, active_adapters in made.asked]
    assert choices == [(("one", 1.0),), (("two", 1.0),), (), *[half] * 5]
    shown = notes.splitlines()
    assert shown[0] == "active: one (weight 1); loaded: base, one, two"
    assert shown[2] == "active: the base model alone; loaded: base, one, two"
    assert shown[3] == "active: one (weight 0.5) + two (weight -0.25); loaded: base, one, two"
    assert [line.split(".")[0] for line in shown[4:]] == [
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
    """Both ways to write them, as texts or numbers; the next answer has them and no other changes."""
    made = Scripted(echo)
    before = dataclasses.replace(SETTINGS, seed=3, stop="x")
    _, notes, problem = piped(made, f"/params {line}\nq\n", before)
    assert made.asked[0][1] == dataclasses.replace(before, **values)
    assert [shown.split()[0] for shown in notes.splitlines()] == list(values)
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
    """The same checks and messages as on the command line."""
    made = Scripted(echo)
    _, notes, _ = piped(made, f"/params {line}\nq\n")
    assert words in notes
    assert "--help" not in notes
    assert len(notes.splitlines()) == 1
    assert made.asked[0][1] == SETTINGS


def test_params_are_listed_with_what_does_nothing(piped):
    """All options of an answer with their values, and why one is idle in this mode; or one of them."""
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
    """From the settings or the command it leads every conversation; `none` takes it away."""
    made = Scripted(echo)
    settings = dataclasses.replace(SETTINGS, system="Be kind.")
    _, notes, _ = piped(made, "a\n/system Be brief.\nb\n/system\n/system none\nc\n", settings)
    assert [texts[0] for texts in made.questions] == ["Be kind.", "Be brief.", "a"]
    assert notes.splitlines() == ["system prompt: Be brief."] * 2 + ["system prompt: none"]


def test_template_without_a_system_turn(piped):
    """It is told, for the option and the command, and questions are answered without."""
    made = Scripted(echo, NO_SYSTEM)
    _, notes, problem = piped(
        made, "a\n/system Be brief.\n", dataclasses.replace(SETTINGS, system="Be kind.")
    )
    assert made.questions == [["a"]]
    assert [line.count("template bare has no place") for line in notes.splitlines()] == [1, 1]
    assert problem == "1 of 2 lines failed."


def test_help_exit_and_unknown_commands(piped):
    """/help names every command, an unknown one the known; nothing is read behind /exit."""
    made = Scripted(echo)
    _, notes, problem = piped(made, "/help\n/stop\n/\n/exit\nq\n")
    *helped, unknown, empty = notes.splitlines()
    names = [*terminal_commands.COMMANDS, "exit"]
    assert [line.split()[0] for line in helped] == [f"/{name}" for name in names]
    assert unknown.startswith("error: There is no command /stop.")
    assert all(f"/{name}" in unknown for name in names)
    told = [what for _, _, what in terminal_commands.COMMANDS.values()]
    assert len({line.index(what) for line, what in zip(helped, told, strict=False)}) == 1, "one column"
    assert empty.startswith("error: There is no command /.")
    assert (made.asked, problem) == ([], "2 of 3 lines failed.")


def test_saved_chat_has_all_that_made_it(piped, tmp_path, monkeypatch):
    """One line of JSON: turns, every option, adapters, system prompt; readable where chats are read."""
    monkeypatch.chdir(tmp_path)
    made = Scripted(
        lambda _: iter([PartialText("odd \u2028 “text” \x85 \x1b[31m\n漢", tokens=3, finished="end")])
    )
    settings = dataclasses.replace(SETTINGS, system="Be kind.", lora_path="x", auth="me:secret")
    lines = "first\n/params top_k 3\n/adapter one:0.5\nsecond\n/save my chat.jsonl\n/save\n"
    _, notes, problem = piped(made, lines, settings)
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
    assert [turn["options"]["seed"] for turn in saved["turns"]] == [11, 11]  # the one that was drawn
    [own] = set(tmp_path.glob("chat-*.jsonl"))
    assert re.fullmatch(r"chat-\d{8}-\d{6}\.jsonl", own.name)
    assert own.name in notes


def test_saving_adds_and_never_overwrites(piped, tmp_path):
    """Two saves are two lines behind what was there, even when that ends without a new line."""
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
    """Turns, options, weights, template and system prompt; /retry asks its last question."""
    path = tmp_path / "chats.jsonl"
    settings = dataclasses.replace(SETTINGS, system="Be kind.")
    piped(Scripted(echo), f"a\n/params top_k 3\n/adapter two:0.5\nb\n/save {path}\n", settings)
    made = Scripted(echo)
    _, notes, problem = piped(made, f"/load {path}\n/retry\nc\n")
    assert (notes, problem) == ("Loaded: 2 turns, options, adapters and template.\n", "")
    assert made.questions == [["Be kind.", "a", "A", "b"], ["Be kind.", "a", "A", "b", "B", "c"]]
    for _, asked, active_adapters in made.asked:
        assert (asked.top_k, asked.max_new_tokens, active_adapters) == (3, 20, (("two", 0.5),))
    piped(Scripted(echo), f"/template alpaca\na\n/save {path}\n")
    made = Scripted(echo)
    piped(made, f"/load {path}\nb\n")
    assert made.template_names == ["alpaca"]


def test_retry_of_a_loaded_turn_has_its_input(piped, tmp_path):
    """What a question was about is asked again with it, and saved again; not with the next question."""
    path = tmp_path / "chats.jsonl"
    piped(Scripted(echo), f"a\n/save {path}\n")
    saved = json.loads(path.read_text())
    saved["turns"][0]["input"] = "about"
    path.write_text(json.dumps(saved), encoding="utf-8")
    asked = []
    made = Scripted(lambda conversation: asked.append(conversation.turns[-1]) or echo(conversation))
    _, _, problem = piped(made, f"/load {path}\n/retry\n/retry\nb\n/save {path}\n")
    assert problem == ""
    assert [(turn.text, turn.input) for turn in asked] == [("a", "about"), ("a", "about"), ("b", "")]
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
    """One line for each; the rest is restored."""
    path = tmp_path / "chat.jsonl"
    piped(Scripted(echo), f"a\n/params top_k 3\n/save {path}\n")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}), encoding="utf-8")
    made = Scripted(echo)
    _, notes, problem = piped(made, f"/load {path}\nb\n")
    assert (problem, len(notes.splitlines())) == ("", 2)
    assert words in notes.splitlines()[1]
    [(texts, asked, active_adapters)] = made.asked
    assert (texts, asked.top_k) == (["a", "A", "b"], 3)
    assert active_adapters == ((("two" if "two" in str(change) else "one"), 1.0),)


def test_files_that_hold_no_chat(piped, tmp_path):
    """One message each, and the conversation stays."""
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "other.jsonl").write_text('{"rows": 1}\n')
    lines = "".join(f"/load {tmp_path / name}\n" for name in ("none.jsonl", "bytes.jsonl", "other.jsonl"))
    made = Scripted(echo)
    _, notes, problem = piped(made, f"a\n{lines}/load\nb\n")
    assert problem == "4 of 6 lines failed."
    assert len(notes.splitlines()) == 4
    assert "/load needs a file." in notes
    assert "the file is not text" in notes
    assert made.questions[-1] == ["a", "A", "b"]


def test_templates(piped):
    """/template chooses for the next answers, `trained` goes back; without a system turn the prompt goes."""
    made = Scripted(echo)
    settings = dataclasses.replace(SETTINGS, system="Be kind.")
    _, notes, problem = piped(made, "a\n/template alpaca\nb\n/template trained\nc\n/template\n", settings)
    assert (made.template_names, problem) == (["", "alpaca", ""], "")
    assert made.questions[1] == ["a", "A", "b"]
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
    """One message, and nothing is written."""
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
    """A random answer as Chat.stream may tell it: what was open may become another text, or none."""
    whole = "".join(chance.choices(ALPHABET, k=chance.randint(0, 90)))
    texts, place = [], 0
    while place < len(whole):
        place = min(len(whole), place + chance.choice([0, 0, 1, 1, 2, 9]))
        rest = whole[place:] if chance.random() < 0.5 else "".join(chance.choices(ALPHABET, k=60))
        opened = rest[: chance.randint(0, 60)] if chance.random() < 0.8 else ""
        texts.append(PartialText(whole[:place], opened, tokens=place + 1))
    why = chance.choice(["end", "stop", "length", decoding.CANCELLED, decoding.NO_MEMORY])
    final = texts[-1].stable if texts else ""
    if texts and chance.random() < 0.3:  # held back until the end
        final = whole + "tail"
    return [*texts, PartialText(final, tokens=len(final), finished=why)]


class Glass:
    """A terminal's screen: wraps, wide letters, the few sequences that are used; anything else fails."""

    def __init__(self, width: int):
        self.width, self.rows, self.row, self.column, self.saved = width, {}, 0, 0, (0, 0)

    def take(self, text: str) -> "Glass":
        while text:
            found = re.match(r"\x1b7|\x1b8|\x1b\[J|\x1b\[[02]m|[^\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
            assert found, f"a control character: {text[:9]!r}"
            text = text[found.end() :]
            self.obey(found[0])
        return self

    def obey(self, what: str) -> None:
        if what == "\x1b7":
            self.saved = (self.row, self.column)
        elif what == "\x1b8":
            self.row, self.column = self.saved
        elif what == "\x1b[J":
            gone = [place for place in self.rows if place >= (self.row, self.column)]
            for place in gone:
                del self.rows[place]
        elif what == "\n":
            self.row, self.column = self.row + 1, 0
        elif what == "\t":
            self.column = min(self.column // 8 * 8 + 8, self.width - 1)
        elif what[0] != "\x1b":
            cells = wcwidth(what)
            if cells == 0:
                before = (self.row, self.column - 1)
                self.rows[before] = self.rows.get(before, "") + what
                return
            if self.column + cells > self.width:
                self.row, self.column = self.row + 1, 0
            self.rows[self.row, self.column] = what
            self.column += cells


@pytest.mark.parametrize("width", [9, 40])
def test_random_answers_are_drawn_exactly(monkeypatch, capsys, width):
    """At every step the screen shows the stable text with a beginning of the open one on the same line; at
    the end the final text, as if it had been printed at once. The printed pieces join to it."""
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
    """It fills the rest of the line but its last column, wide letters count double; a full line has none."""
    monkeypatch.setenv("COLUMNS", "10")
    screen = Screen(live=True)
    shown = [
        ("abc", "defghijkl"),
        ("abcd", "漢字漢字"),
        ("abcd漢", "a\nb"),
        ("abcd漢abcd", "rest"),
        ("abcd漢abcd\n", "x"),
    ]
    for stable, opened in shown:
        screen.show(stable, opened)
    drawn = re.findall("\x1b7\x1b\\[2m(.*?)\x1b\\[0m", capsys.readouterr().out)
    assert drawn == ["defghi", "漢字", "a", "x"]


def test_random_answers_join_in_a_pipe(piped):
    """Only stable text, each piece once: what is printed is the final text and a new line."""
    chance = random.Random(0)
    answers = [growing(chance) for _ in range(300)]
    waiting = iter(answers)
    out, _, _ = piped(Scripted(lambda _: iter(next(waiting))), "q\n" * 300, single_turn=True)
    assert out == "".join(visible(texts[-1].stable) + "\n" for texts in answers)


def test_a_final_text_that_contradicts_is_printed_whole(capsys):
    """A tokenizer may decode the whole otherwise than its parts: then the whole is printed once more."""
    screen = Screen(live=False)
    for stable in ("one", "one t", "One two"):
        screen.show(stable)
    screen.end()
    assert capsys.readouterr().out == "one t\nOne two\n"


def test_output_that_has_no_such_letters(monkeypatch):
    """An answer in a terminal that is not UTF-8 gets question marks, not an error."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é漢\n".encode())))
    terminal.talk(Scripted(echo), SETTINGS)
    assert out.buffer.getvalue() == b"\xc9?\n"


# A real terminal


class Pty:
    """A forked child whose terminal is ours: keys go in, what it shows comes out."""

    def __init__(self, run: Callable[[], None], environment: dict[str, str]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads: the child uses none of them
            self.pid, self.fd = pty.fork()
        if self.pid == 0:
            self._child(run, environment)
        self.text, self.place = "", 0

    def _child(self, run: Callable[[], None], environment: dict[str, str]) -> None:
        code = 99
        try:
            os.environ.update({"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "COLUMNS": "80", **environment})
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            run()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def keys(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def line(self, text: str) -> None:
        self.keys(f"{text}\r")

    def see(self, pattern: str, seconds: float = 20) -> re.Match:
        """Wait until this comes behind what was seen before."""
        end = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.S).search(self.text, self.place)):
            ready, _, _ = select.select([self.fd], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern!r} did not come; there is {self.text[self.place :]!r}"
            with contextlib.suppress(OSError):
                if data := os.read(self.fd, 65536):
                    self.text += data.decode(errors="replace")
                    continue
            raise AssertionError(f"{pattern!r} did not come before the end: {self.text[self.place :]!r}")
        self.place = found.end()
        return found

    def press_until(self, keys: str, shown: str, seconds: float = 20) -> None:
        """Press these keys again and again until this is shown."""
        end = time.monotonic() + seconds
        while shown not in self.text[self.place :]:
            assert time.monotonic() < end, f"{shown!r} did not come; there is {self.text[self.place :]!r}"
            self.keys(keys)
            if select.select([self.fd], [], [], 0.2)[0]:
                self.text += os.read(self.fd, 65536).decode(errors="replace")
        self.place = len(self.text)

    def code(self) -> int:
        """The exit code, once it has ended."""
        with contextlib.suppress(OSError):
            while data := os.read(self.fd, 65536):
                self.text += data.decode(errors="replace")
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


READY = r"\x1b\[\?2004h.*?>.*?\x1b\[\?25h"  # a paste may come, the prompt, the cursor


@pytest.fixture
def shell(tmp_path):
    """Starts `talk` in a pseudo-terminal of its own."""
    opened = []

    def start(made, settings: ChatConfig = SETTINGS, **environment: str) -> Pty:
        run = lambda: terminal.talk(made() if callable(made) else made, settings)  # noqa: E731
        opened.append(Pty(run, {"ONECARD_CACHE": str(tmp_path / "cache"), **environment}))
        return opened[-1]

    yield start
    for each in opened:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)


def slowly(conversation: Conversation) -> Iterator[PartialText | chat.Reply]:
    """`read` shows how a prompt is read, `beams` an open part, `long` writes for minutes."""
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
    """Editing, status line, what may still change, Ctrl-C in an answer and at the prompt, errors, /exit."""
    made = shell(Scripted(slowly))
    made.see("/help lists commands")
    made.see(READY)
    made.line("hello there")
    made.see("HELLO THERE\r\n\x1b\\[2m11 tokens · .*context.*\x1b\\[0m\r\n")
    made.see(READY)
    made.line("read")
    made.see("\x1b7\x1b\\[2mreading 3/7 tokens\x1b\\[0m\x1b8\x1b\\[JREAD\r\n")
    made.see(READY)
    made.line("long")
    made.see("la la la")
    made.keys("\x03")
    made.see("\r\n\x1b\\[2m.*? · stopped\x1b\\[0m")
    assert "^C" not in made.text
    made.see(READY)
    made.line("beams")
    made.see("maybe")
    made.keys("typed ahead")
    made.see("JAMS\r\n\x1b\\[2m5 tokens .*?typed ahead")
    made.keys("\x03")
    made.see("Ctrl-D leaves")
    made.see(READY)
    made.keys("two\x1b\rlines\\\rin all\r")
    made.see("TWO\r\nLINES\r\nIN ALL\r\n")
    made.see(READY)
    made.line("fail")
    made.see("begun\x1b7\x1b\\[2m perhaps\x1b\\[0m\x1b8\x1b\\[J\r\nerror: ValueError: no luck")
    made.see(READY)
    made.line("/save " + str(tmp_path / "chat.jsonl"))
    made.see("Saved")
    made.see(READY)
    made.line("/exit")
    assert made.code() == 0
    saved = json.loads((tmp_path / "chat.jsonl").read_text(encoding="utf-8"))
    asked = [turn["question"] for turn in saved["turns"]]
    assert asked == ["hello there", "read", "long", "beams", "two\nlines\nin all"]
    assert re.fullmatch("(la )+", saved["turns"][2]["answer"])  # what was there is kept


def test_what_beams_may_still_change(shell):
    """The open part is dim and taken back; a model's escape sequences become harmless text."""
    made = shell(Scripted(slowly))
    made.see(READY)
    made.line("beams")
    made.see("BE\x1b7\x1b\\[2m maybe\x1b\\[0m\x1b8\x1b\\[JAMS")
    made.see(READY)
    made.line("wild")
    made.see(re.escape("red[31m]0;title2J.\x1b7\x1b[2m[1mopen\x1b[0m\x1b8\x1b[J"))
    made.see(READY)
    made.keys("\x04")
    assert made.code() == 0


OLDEST = "\x1b[A"  # the arrow that goes back, and stays at the oldest


def test_history_and_completion(shell, tmp_path):
    """Questions of an earlier session come back with the arrow; their file is for its owner alone."""
    path = tmp_path / "cache" / "chat-history"
    path.parent.mkdir()
    path.touch(mode=0o644)
    for keys in ("first question", OLDEST):
        made = shell(Scripted(echo))
        made.see(READY)
        if keys == OLDEST:
            made.press_until(keys, "question")  # the history is read in the background
        else:
            made.keys(keys)
        made.line("")
        made.see("FIRST QUESTION\r\n")
        made.see(READY)
        made.keys("/he\t")
        made.see("lp")
        made.line("")
        made.see("/clear.*begin a new conversation")
        made.see(READY)
        made.keys("\x04")
        assert made.code() == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().count("+first question") == 2


def test_history_that_cannot_be_kept(monkeypatch, tmp_path):
    """A new file is 0600 whatever the umask; where none can be written, the session does without."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "new" / "cache"))
    before = os.umask(0)
    try:
        kept = line_editor.history()
    finally:
        os.umask(before)
    path = tmp_path / "new" / "cache" / "chat-history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.unlink()
    path.mkdir()
    kept.append_string("no place for it")
    monkeypatch.setenv("ONECARD_CACHE", "/dev/null/cache")
    assert isinstance(line_editor.history(), line_editor.InMemoryHistory)


def test_a_terminal_without_escapes(shell):
    """TERM=dumb: stable text and plain remarks, nothing to erase."""
    made = shell(Scripted(slowly), TERM="dumb")
    made.see("> $")
    made.line("beams")
    made.see("BEAMS\r\n5 tokens.*> $")
    made.line("/exit")
    assert made.code() == 0
    assert not re.search("\x1b(7|8|\\[2m|\\[J)", made.text)


def test_ctrl_c_stops_a_real_answer(shell, tiny_model):
    """A tiny Llama: Ctrl-C in the middle of a long answer, then the prompt, another answer, /exit, code 0."""

    def tiny_chat() -> chat.Chat:
        made = real_chat(tiny_model)
        plain = made.engine.scores

        def slow(*how):  # 400 tokens take at least eight seconds
            time.sleep(0.02)
            return plain(*how)

        made.engine.scores = slow
        return made

    settings = ChatConfig(mode="sample", seed=1, max_new_tokens=400, min_new_tokens=400)
    made = shell(tiny_chat, settings)
    made.see(READY, 60)
    made.line("Say red")
    made.see("2004l.{20}")  # twenty letters of the answer
    made.keys("\x03")
    stopped = made.see("\x1b\\[2m(\\d+) tokens · .* · stopped\x1b\\[0m")
    assert 0 < int(stopped[1]) < 400
    made.see(READY)
    made.line("/params max_new_tokens=5 min_new_tokens=5 mode=beam")
    made.see(READY)
    made.line("Say blue")
    made.see("\x1b\\[2m5 tokens · .* tokens/s · first token after .*/ 512 context tokens.*ended at the limit")
    made.see(READY)
    made.line("/exit")
    assert made.code() == 0


def real_chat(folder: Path) -> chat.Chat:
    tokenizer = models_tokenizer.load_tokenizer(str(folder))
    made = base_model.load_base(str(folder), 16, "fp32", "cpu").eval()
    engine = transformers_engine.Engine(made, tokenizer, 512)
    return chat.Chat(engine, tokenizer, data_template.load("alpaca", tokenizer))


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_pipe_to_a_real_model(piped, tiny_model, mode):
    """The lines are what Chat.stream's last reply holds, the second with the first in its conversation."""
    made = real_chat(tiny_model)
    settings = ChatConfig(mode=mode, max_new_tokens=12)
    out, notes, problem = piped(made, "Say red\nSay blue\n", settings)
    turns, expected = (), ""
    for question in ("Say red", "Say blue"):
        turns = (*turns, Turn("user", question))
        *_, last = made.stream(Conversation(turns), settings)
        turns = (*turns, Turn("assistant", last.text.stable))
        expected += visible(last.text.stable) + "\n"
    assert (out, notes, problem) == (expected, "", "")


def test_ctrl_c_ends_a_pipe(piped):
    """In a script Ctrl-C is for the whole program."""

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
    """cpu_chat.sh in a folder where python says what it was given: (arguments, environment) -> its words."""
    for name in ("cpu_chat.sh", "tools/launch.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    (tmp_path / "tools" / "setup.sh").write_text('test "$1" = cpu\n', encoding="utf-8")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)

    def call(*arguments: str, **environment: str) -> list[str]:
        own = {**os.environ, **environment}
        command = ["bash", str(tmp_path / "cpu_chat.sh"), *arguments]
        ended = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
        program, *rest = ended.stdout.splitlines()
        assert program == "tools/cpu_chat.py"
        return rest

    return call


def test_entry_takes_the_demo_adapter_when_nothing_else_is_named(entry, tmp_path):
    """The adapter just trained, unless a model or an adapter is given in any way; all flags arrive."""
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
    """--help answers without a model, and names the engine."""
    command = [sys.executable, "-X", "importtime", "tools/cpu_chat.py", "--help"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "[llama.cpp; execution]" in " ".join(ended.stdout.split())
    assert "torch" not in ended.stderr
