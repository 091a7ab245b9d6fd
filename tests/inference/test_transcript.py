"""Saved chats: what they hold and what is restored from them, in the window without a browser."""

import dataclasses
import json
from pathlib import Path

import gradio as gr
import pytest

from onecard.config.chat import ONE_SEQUENCE, ChatConfig
from onecard.config.declaration import declared
from onecard.config.generation import BASE, MIX, TRAINED, Generation
from onecard.data.template import Template
from onecard.errors import UserError
from onecard.inference import transcript
from onecard.inference.engine import Capabilities
from onecard.inference.transcript import LEFT, RIGHT
from onecard.ui import chat_window
from tests.support.chat_fakes import PLAIN_TEMPLATE, Toy

START = ChatConfig(mode="sample", temperature=0.5, system="Be kind.")
TURN = {"question": "q", LEFT: "a"}


@pytest.fixture
def window():
    def make(chat: Toy) -> chat_window.ChatWindow:
        with gr.Blocks() as page:
            return chat_window.ChatWindow(page, chat, START)

    return make


def saved(chat: Toy, adapters_by_side: dict, form: str = TRAINED, **options) -> dict:
    settings = Generation(**{"top_k": 7, **options})
    line = transcript.record(
        [TURN], settings, chat, START, adapters_by_side, form, system="Be brief.", context="c"
    )
    return json.loads(line)


def load(window, chat: Toy, tmp_path: Path, values: dict, weights=(1.0, 1.0)) -> tuple[dict, str]:
    """Return what each input shows after loading (without those that stay as before), and the status line."""
    page = window(chat)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(values), encoding="utf-8")
    updates, layout = page.saved_chats.load(str(path), *weights), page.layout
    assert not path.exists(), "the server keeps no chat"
    components = [*page.view.outputs(), *layout.side()]
    assert len(updates) == len(components)
    named = {layout.adapter: "adapter", layout.compare: "compare", layout.against: "against"}
    named |= {layout.template: "form", layout.system: "system", layout.context: "context"}
    named |= {layout.state: "turns"}
    named |= {component: name for name, component in layout.inputs.items()}
    named |= {slider: slider.label for slider in layout.weights}
    inputs = {
        named[one]: value
        for one, value in zip(components, updates, strict=True)
        if one in named and not (isinstance(value, dict) and value.get("__type__") == "update")
    }
    return inputs, updates[page.view.outputs().index(layout.status)]


@pytest.mark.parametrize(
    ("adapters_by_side", "pickers"),
    [
        ({LEFT: (("two", 0.5),)}, ("two", False, 1.0, 0.5)),
        ({LEFT: ()}, (BASE, False, 1.0, 1.0)),
        ({LEFT: (("one", 0.25), ("two", 1.5))}, (MIX, False, 0.25, 1.5)),
        ({LEFT: (("two", 1.0),), RIGHT: (("one", 0.5),)}, ("two", True, 0.5, 1.0)),
        ({LEFT: (("one", 1.0),), RIGHT: ()}, ("one", True, 1.0, 1.0)),
    ],
)
def test_a_loaded_chat_is_as_it_was_saved(window, tmp_path, adapters_by_side, pickers):
    """Turns, texts, options, template, adapters, weights and the comparison are restored."""
    chat = Toy()
    inputs, status = load(window, chat, tmp_path, saved(chat, adapters_by_side, "alpaca", seed=5))
    assert (inputs["adapter"], inputs["compare"], inputs["one"], inputs["two"]) == pickers
    if RIGHT in adapters_by_side:
        assert inputs["against"] == (adapters_by_side[RIGHT][0][0] if adapters_by_side[RIGHT] else BASE)
    assert (inputs["system"], inputs["context"], inputs["form"]) == ("Be brief.", "c", "alpaca")
    assert (inputs["top_k"], inputs["seed"], inputs["temperature"]) == (7, 5, 0.7)
    assert inputs["turns"] == [TURN]
    assert "Loaded." in status
    assert "alert" not in status


@pytest.mark.parametrize(
    ("change", "words", "kept"),
    [
        ({"adapters": {LEFT: {"three": 1.0}}}, "No adapter is called three", {"adapter": None}),
        ({"adapters": {LEFT: {"one": 5.0}}}, "weights one:5", {"adapter": "one", "one": 2.0}),
        ({"template": "gone"}, "there is no template gone here", {"form": None}),
        (
            {"options": {"mode": "beam"}},
            "toy has no mode beam: greedy is used instead",
            {"mode": "greedy"},
        ),
        ({"options": {"temperature": 9}}, "Temperature 9.0 is beyond the slider", {"temperature": 2}),
        ({"options": {"max_memory": 9999}}, "Max memory 9999 is beyond", {"max_memory": 8192}),
    ],
)
def test_what_cannot_be_restored_is_named(window, tmp_path, change, words, kept):
    """It is left out or clamped, with one notice for all of it, and the turns are restored."""
    chat = Toy(Capabilities(interleaves=False, lacks={"beam": ONE_SEQUENCE}))
    inputs, status = load(window, chat, tmp_path, {**saved(chat, {LEFT: ()}), **change})
    assert words in status
    assert "with differences from the saved chat" in status
    assert inputs["turns"] == [TURN]
    for name, value in kept.items():
        assert inputs.get(name) == value


def test_another_commit_than_the_chat_was_saved_with_is_named(window, tmp_path):
    """Both commits of a base or adapter of the hub are named; if they are equal there is no notice."""
    chat = Toy()
    chat.versions = {"base": "someone/model@" + "a" * 40, "one": "someone/lora@" + "c" * 40}
    values = saved(chat, {LEFT: ()})
    assert values["versions"] == chat.versions
    assert "differences" not in load(window, chat, tmp_path, values)[1]
    chat.versions = {**chat.versions, "base": "someone/model@" + "b" * 40}
    status = load(window, chat, tmp_path, values)[1]
    assert all(f"someone/model@{letter * 40}" in status for letter in "ab")
    assert "someone/lora" not in status


@pytest.mark.parametrize("name", ["top_k", "no_repeat_ngram_size", "max_memory", "last_turns"])
def test_zero_on_a_slider_is_explained(name):
    """Zero switches a limit off, which nobody would guess from the number."""
    option = declared(Generation)[name]
    assert option.slider[0] == 0
    assert "0 = " in option.help[0]


def test_a_template_that_this_vocabulary_lacks_is_named(window, tmp_path):
    """The present template stays, because every question would fail with the other."""

    class Lacking(Toy):
        def template_of(self, name: str = TRAINED) -> Template:
            if name == "chatml":
                raise UserError("Template chatml needs a token that is not there.", "Choose another.")
            return super().template_of(name)

    chat = Lacking()
    values = {**saved(chat, {LEFT: ()}), "template": "chatml"}
    inputs, status = load(window, chat, tmp_path, values)
    assert "Template chatml needs a token that is not there. plain stays" in status
    assert "form" not in inputs
    read, notes = transcript.fitted(transcript.read(json.dumps(values)), chat)
    assert (read.template, len(notes)) == (None, 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"turns": 1}', '{"turns": [], "options": {"mode": "x"}}'])
def test_files_that_hold_no_chat(window, tmp_path, text):
    """The error says so, and nothing on the page changes."""
    with pytest.raises(UserError, match="not a saved chat") as caught:
        transcript.read(text)
    assert caught.value.code == 3


def test_a_file_that_an_editor_marked_as_utf8(tmp_path):
    """A byte order mark, as some editors write it, is accepted; bytes that are no text are an error."""
    line = transcript.record([TURN], Generation(), Toy(), START, {LEFT: ()}, system="", context="")
    file = tmp_path / "chat.jsonl"
    file.write_text(line, encoding="utf-8-sig")
    assert transcript.load(file).turns == [TURN]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="the file is not text"):
        transcript.load(file)


def test_turns_keep_what_made_them():
    """Options (with the drawn seed), adapters and template of each turn survive saving twice."""
    chat = Toy()
    origin = transcript.made_by(chat, Generation(seed=9), {LEFT: (("one", 0.5),), RIGHT: ()}, "alpaca")
    turn = {"question": "q", "input": "i", LEFT: "a", RIGHT: "b", **origin}
    line = transcript.record([turn], Generation(), chat, START, {LEFT: ()}, system="", context="")
    read = transcript.read(line)
    assert read.turns == [turn]
    assert read.turns[0]["options"]["seed"] == 9
    assert read.turns[0]["adapters"] == {LEFT: {"one": 0.5}, RIGHT: {}}
    for bad in ({"options": {"top_k": "x"}}, {"adapters": {LEFT: {"one": float("nan")}}}, {"adapters": 3}):
        with pytest.raises((UserError, ValueError, TypeError, AttributeError)):
            transcript.turns_of([{**turn, **bad}])


def test_a_new_session_is_as_the_program_was_started(window):
    """Template, adapter, comparison, weights, options and texts are those of the start, without turns."""
    page = window(Toy(active_adapters=(("one", 0.25), ("two", 1.0))))
    layout = page.layout
    components = [*page.view.outputs(), *layout.side()]
    updates = dict(zip(components, page.new_session(), strict=True))
    assert updates[layout.state] == []
    assert [updates[one] for one in layout.pickers()] == [TRAINED, MIX, False, BASE]
    assert [updates[one] for one in layout.weights] == [0.25, 1.0]
    assert (updates[layout.system], updates[layout.context]) == ("Be kind.", "")
    assert updates[layout.inputs["temperature"]] == 0.5


def test_what_a_tab_kept_is_checked(window):
    """A tab's storage may hold anything: valid turns are restored, anything else is no chat."""
    saved_chats = window(Toy()).saved_chats
    assert saved_chats.reopen(json.dumps([TURN]))[0] == [TURN]
    for stored in (None, "", "{", "7", '{"a": 1}', '[{"question": "q"}]', "[[]]", "[" * 100_000):
        assert saved_chats.reopen(stored)[0] == []


def test_a_template_without_a_system_turn_closes_its_box(window):
    """The closed box gives the reason, and a template with a system turn opens it again."""
    layout = window(Toy()).layout
    assert layout.system_prompt_state(TRAINED) == {"interactive": True, "info": ""}
    layout.chat.template = dataclasses.replace(PLAIN_TEMPLATE, system=None)
    closed = layout.system_prompt_state("alpaca")
    assert closed == {"interactive": False, "info": "template alpaca has no place for it"}
