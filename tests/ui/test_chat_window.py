"""The chat window while an answer grows, stops or fails, without a browser."""

import threading
import types
from collections.abc import Iterator

import gradio as gr
import pytest

from onecard.config.chat import ChatConfig
from onecard.config.generation import BASE, TRAINED
from onecard.errors import UserError
from onecard.inference.decoding import CANCELLED, END
from onecard.inference.detokenizer import PartialText
from onecard.inference.transcript import LEFT, RIGHT
from onecard.ui import chat_controls, chat_window, single_window
from onecard.ui import sessions as ui_sessions
from tests.support.chat_fakes import Scripted, echo, reply
from tests.support.training_page import eventually

PAGE = types.SimpleNamespace(session_hash="page")
OLD = {"question": "q", LEFT: "old", RIGHT: "old too"}


class Sides(Scripted):
    """A chat with a script of texts or errors for each side; the active adapters tell the sides apart."""

    def __init__(self, left: list, right: list, name: str = "toy"):
        super().__init__(echo)
        self.scripts, self.engine.name = {(("one", 1.0),): left, (): right}, name

    def stream(
        self, conversation, settings, active_adapters=None, cancelled=lambda: False, template_name=""
    ) -> Iterator:
        for step in self.scripts[active_adapters]:
            if isinstance(step, Exception):
                raise step
            yield reply(step)


def window(chat: Scripted, **options) -> chat_window.ChatWindow:
    with gr.Blocks():
        return chat_window.ChatWindow(gr.Blocks(), chat, ChatConfig(mode="greedy", **options))


def answered(
    chat_page: chat_window.ChatWindow, what: str, turns: list, compare: bool = False, **side
) -> list[dict]:
    """The outputs of the page at each step of a button's work."""
    layout = chat_page.layout
    values = {component: component.value for component in layout.side()}
    values |= {layout.compare: compare, layout.against: BASE, layout.template: side.get("form", TRAINED)}
    box = "new" if what == "ask" else "in the box"
    steps = getattr(chat_page.answers, what)(PAGE, box, turns, *values.values())
    names = ("turns", "kept", "left", "right", "status", "box", "beams")
    return [dict(zip(names, step, strict=True)) for step in steps]


@pytest.mark.parametrize(("what", "box"), [("ask", "new"), ("retry", "in the box")])
def test_an_answer_stopped_before_its_first_token_changes_nothing(what, box):
    """Turns and the browser's storage stay as they were, and the question is in the box again."""
    chat_page = window(Sides([PartialText(""), PartialText("", finished=CANCELLED)], []))
    *_, last = answered(chat_page, what, [OLD])
    assert (last["turns"], last["box"]) == ([OLD], box)
    assert "old" in last["kept"]
    assert [message["content"] for message in last["left"]] == ["q", "old"]
    assert "stopped" in last["status"]
    assert "alert" not in last["status"]


def test_an_answer_that_ends_empty_is_a_turn():
    chat_page = window(Sides([PartialText("", finished=END)], []))
    *_, last = answered(chat_page, "ask", [OLD])
    assert [turn["question"] for turn in last["turns"]] == ["q", "new"]
    assert "new" in last["kept"]


WHOLE = [PartialText("a"), PartialText("a b"), PartialText("a b c", finished=END)]
BROKEN = [UserError("No memory for this side.", "Wait.")]


@pytest.mark.parametrize("engine", ["toy", "transformers"])
@pytest.mark.parametrize("failing", [LEFT, RIGHT])
def test_an_error_of_one_side_stays_and_the_other_answers(engine, failing):
    """The error is shown until the end, whichever side comes first."""
    sides = (BROKEN, WHOLE) if failing == LEFT else (WHOLE, BROKEN)
    steps = answered(window(Sides(*sides, name=engine)), "ask", [OLD], compare=True)
    last, other = steps[-1], RIGHT if failing == LEFT else LEFT
    assert last["turns"][-1][other] == "a b c"
    assert last["turns"][-1].get(failing) == ""
    assert "a b c" in last["kept"]
    assert "No memory for this side" in last["status"]
    assert "alert" in last["status"]


def test_an_answer_that_cannot_go_on_stays():
    """When one of two sides fails to continue, its earlier text stays."""
    chat_page = window(Sides(BROKEN, WHOLE))
    *_, last = answered(chat_page, "go_on", [OLD], compare=True)
    assert (last["turns"][-1][LEFT], last["turns"][-1][RIGHT]) == ("old", "a b c")
    assert last["left"][-1]["content"] == "old"


def test_errors_of_both_sides_change_nothing():
    chat_page = window(Sides(BROKEN, BROKEN))
    *_, last = answered(chat_page, "retry", [OLD], compare=True)
    assert (last["turns"], last["box"]) == ([OLD], "in the box")
    assert last["status"].count("No memory for this side") == 1


def test_a_system_prompt_that_the_template_cannot_hold_is_left_out():
    """The question is answered without it, and the status line says so."""
    chat = Scripted(echo)
    chat_page = window(chat, system="Be kind.")
    *_, last = answered(chat_page, "ask", [])
    assert chat.questions == [["Be kind.", "new"]]
    assert "left out" not in last["status"]
    *_, last = answered(chat_page, "ask", [], form="alpaca")
    assert chat.questions[1:] == [["new"]]
    assert last["turns"][-1][LEFT] == "NEW"
    assert "the system prompt is left out: template alpaca has no place for it" in last["status"]


def test_the_single_turn_window_leaves_it_out_too():
    chat = Scripted(echo)
    page = single_window.build_page(chat, ChatConfig(mode="greedy", system="Be kind."))
    [work] = [event.fn for event in page.fns.values() if getattr(event.fn, "__name__", "") == "answer"]
    [inputs] = [event.inputs for event in page.fns.values() if event.fn is work]
    values = [component.value for component in inputs]
    for form, expected in ((TRAINED, ["Be kind.", "new"]), ("alpaca", ["new"])):
        *_, (_, _, status) = work(PAGE, "new", "", values[2], form, *values[4:])
        assert chat.questions[-1] == expected
        assert ("the system prompt is left out" in status) == (form == "alpaca")


def test_a_side_that_does_not_go_on_keeps_what_made_it():
    """Continue without the comparison keeps the other answer and the adapters that wrote it."""
    chat_page = window(Sides(WHOLE, []))
    turn = {**OLD, "adapters": {LEFT: {"one": 1.0}, RIGHT: {"two": 0.5}}}
    *_, last = answered(chat_page, "go_on", [turn])
    assert last["turns"][-1][RIGHT] == "old too"
    assert last["turns"][-1]["adapters"] == {LEFT: {"one": 1.0}, RIGHT: {"two": 0.5}}
    *_, last = answered(chat_page, "retry", [turn])
    assert RIGHT not in last["turns"][-1]
    assert last["turns"][-1]["adapters"] == {LEFT: {"one": 1.0}}


@pytest.mark.parametrize(
    ("context", "asked", "kept"), [("facts", "facts", ""), ("facts", "", "facts\n\n"), ("", "", "")]
)
def test_a_summary_keeps_what_it_does_not_know(context, asked, kept):
    """Text in the context box that belonged to no turn stays in front of the summary."""
    chat_page = window(Sides(WHOLE, []))
    layout = chat_page.layout
    values = {component: component.value for component in layout.side()} | {layout.context: context}
    *_, last = chat_page.answers.summarise(PAGE, [{**OLD, "input": asked}], *values.values())
    assert (last[0], last[-1]) == ([], f"{kept}a b c")


def test_edit_last_does_not_overwrite_a_message():
    chat_page = window(Scripted(echo))
    turns, _, _, _, status, box, _, context = chat_page.edit_last("half a thought", "", [OLD])
    assert turns == [OLD]
    assert "not sent yet" in status
    assert box == context == gr.skip()
    turns, _, _, _, _, box, _, context = chat_page.edit_last(" ", "typed", [OLD])
    assert (turns, box, context) == ([], "q", gr.skip())


@pytest.mark.parametrize(("context", "wanted"), [("", "facts"), ("facts", "facts"), ("other", None)])
def test_edit_last_gives_the_context_back(context, wanted):
    """The context comes back into an empty box; other text that was typed there is not overwritten."""
    chat_page = window(Scripted(echo))
    turn = {**OLD, "input": "facts"}
    turns, _, _, _, status, _, _, new_context = chat_page.edit_last("", context, [turn])
    if wanted:
        assert (turns, new_context) == ([], wanted)
    else:
        assert (turns, new_context) == ([turn], gr.skip())
        assert "has changed" in status


def test_all_buttons_that_ask_share_the_places():
    """Otherwise Retry, Continue and Summarise would be answered beyond the limit of the queue."""
    for module, buttons in ((chat_window, 4), (single_window, 1)):
        events = module.build_page(Scripted(echo), ChatConfig(mode="greedy")).fns.values()
        queued = [event for event in events if event.queue and event.inputs]
        assert len(queued) == buttons
        assert {event.concurrency_id for event in queued} == {chat_controls.QUEUE}


def test_a_program_ends_between_two_pieces_of_an_answer(monkeypatch):
    """The program waits for the piece that is computed and begins no other one."""
    steps, inside, go, seen, messages = ui_sessions.Steps(), threading.Event(), threading.Event(), [], []
    monkeypatch.setattr(ui_sessions, "say", messages.append)

    def numbers() -> Iterator[int]:
        inside.set()
        go.wait()
        yield from (1, 2)

    answering = threading.Thread(target=lambda: seen.extend(steps.each(numbers())))
    ending = threading.Thread(target=steps.end)
    answering.start()
    inside.wait()
    ending.start()
    eventually(lambda: steps.is_over)
    eventually(lambda: messages)  # the user learns that the program waits
    assert ending.is_alive()
    go.set()
    for thread in (ending, answering):
        thread.join(20)
        assert not thread.is_alive()
    assert seen == [1]
    steps.allow()
    assert list(steps.each(numbers())) == [1, 2]


def test_stop_while_waiting_is_told():
    """A session waits from the click until its turn in the queue, and not once its answer has begun."""
    sessions = ui_sessions.Sessions()
    sessions.begin("page")
    assert sessions.is_waiting("page")
    sessions.start("page")
    assert not sessions.is_waiting("page")
    sessions.end("page")
    assert not sessions.is_waiting("page")
