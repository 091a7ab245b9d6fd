"""What all chat windows share: the inputs of an answer's options, and the swap of Send and Stop.

An input that has no effect now is disabled and says why.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from onecard.config import declaration
from onecard.config.chat import ChatConfig
from onecard.config.declaration import Place
from onecard.config.generation import SEVERAL_TURNS, TRAINED, Generation
from onecard.data import template as data_template
from onecard.inference.chat import Chat
from onecard.ui import forms, page
from onecard.ui import html as ui_html
from onecard.ui import sessions as ui_sessions

QUEUE = "answers"  # all buttons that ask share this queue and its limit


def answer(chat: Chat, options: ChatConfig, several_turns: bool = False) -> dict[str, gr.Component]:
    """The inputs of an answer's options: the common ones are open, the others are folded.

    several_turns: also the options that are for chats of several turns.
    """
    modes, lang = {"mode": chat.modes()}, options.lang
    idle = {} if several_turns else declaration.without_effect(Generation, [SEVERAL_TURNS])
    facts = {name: fact for name, fact in declaration.declared(Generation).items() if name not in idle}
    common = [name for name, fact in facts.items() if fact.place == Place.COMMON]
    folded = [name for name, fact in facts.items() if fact.place == Place.FOLDED]
    inputs = forms.inputs(options, common, lang, modes)
    with gr.Accordion(forms.text(lang, "More", "更多"), open=False, elem_id="more"):
        inputs |= forms.inputs(options, folded, lang, modes)
    return inputs


def template_picker(chat: Chat, lang: str) -> gr.Dropdown:
    """The choice of the prompt template for the next answers."""
    name = chat.template.name
    trained = forms.text(lang, f"as trained ({name})", f"训练时的模板（{name}）")
    return gr.Dropdown(
        [(trained, TRAINED), *data_template.names()],
        value=TRAINED,
        label=forms.text(lang, "Prompt template", "提示模板"),
        elem_id="template",
    )


def answering(
    triggers: list[Any],
    work: Callable[..., Any],
    inputs: list[gr.Component],
    outputs: list[gr.Component],
    sessions: ui_sessions.Sessions,
    send: gr.Button,
    stop: gr.Button,
    others: list[gr.Component],
    status: gr.HTML,
    lang: str,
    focus: str | None = None,
) -> None:
    """Let the triggers start `work`; while it runs, Stop stands in the place of Send.

    work: yields values of `outputs`; others: disabled meanwhile, since they would disturb it; status: says so
    when too many questions wait already; focus: JavaScript that runs at the end.
    """
    busy = forms.text(
        lang,
        "Too many questions are waiting, so yours was not accepted. Ask again in a moment.",
        "等待回答的问题太多，您的问题未被接受，请稍后再试。",
    )

    def swap(is_running: bool) -> list[Any]:
        buttons = [gr.update(visible=not is_running), gr.update(visible=is_running)]
        return [*buttons, *(gr.update(interactive=not is_running) for _ in others)]

    def begin(request: gr.Request) -> list[Any]:
        sessions.begin(request.session_hash)
        return swap(True)

    @functools.wraps(work)  # gradio reads the parameters of the function
    def turn(request: gr.Request, *values: Any) -> Iterator[Any]:
        sessions.start(request.session_hash)
        yield from ui_sessions.STEPS.each(work(request, *values))

    def end(request: gr.Request) -> list[Any]:
        sessions.end(request.session_hash)
        return swap(False)

    def fail(request: gr.Request) -> list[Any]:
        is_refused = sessions.is_waiting(request.session_hash)  # the queue was full: its turn never came
        return [*end(request), ui_html.status_line(busy, True) if is_refused else gr.skip()]

    changed = [send, stop, *others]
    began = gr.on(triggers, begin, None, changed, **page.QUICK)
    answered = began.then(turn, inputs, outputs, concurrency_id=QUEUE, **page.LONG)
    ended = answered.then(end, None, changed, **page.QUICK)
    answered.failure(fail, None, [*changed, status], **page.QUICK)  # then() does not run after a failure
    if focus:
        ended.then(None, js=focus)


def halting(
    stop: gr.Button, window: gr.Blocks, sessions: ui_sessions.Sessions, status: gr.HTML, lang: str
) -> None:
    """Let Stop, and the closing of the page, end the answer that this page asked for.

    A question that still waits behind others ends only when its turn comes; the status line says so.
    """
    waits = forms.text(lang, "stopped; waiting for other answers to finish", "已停止，等待其他回答结束")

    def leave(request: gr.Request) -> None:
        sessions.stop(request.session_hash)

    def halt(request: gr.Request) -> Any:
        is_waiting = sessions.is_waiting(request.session_hash)
        leave(request)
        return ui_html.status_line(waits) if is_waiting else gr.skip()

    stop.click(halt, None, status, **page.QUICK)
    window.unload(leave)


def wire(
    window: gr.Blocks, chat: Chat, options: ChatConfig, inputs: dict[str, gr.Component], reset: gr.Button
) -> None:
    """Disable the inputs that have no effect in a mode, and let the button set all inputs back."""
    names = list(inputs)
    others = [name for name in names if name != "mode"]

    def enable(mode: str) -> list:
        return forms.usable(others, chat.unused(mode), options, options.lang)

    boxes = [inputs[name] for name in others]
    inputs["mode"].change(enable, inputs["mode"], boxes, **page.QUICK)
    window.load(enable, inputs["mode"], boxes, **page.QUICK)
    reset.click(
        lambda: [getattr(options, name) for name in names],
        None,
        list(inputs.values()),
        **page.QUICK,
    )


def usable_system(chat: Chat, template_name: str, system: str, lang: str) -> tuple[str, str]:
    """The system prompt, '' where the template has no place for one, and a note that says so.

    Raises UserError when the template cannot be used with this model.
    """
    template = chat.template_of(template_name)
    if not system or template.system is not None:
        return system, ""
    return "", forms.text(
        lang,
        f"the system prompt is left out: template {template.name} has no place for it",
        f"模板 {template.name} 没有系统提示，已略去",
    )
