"""The inputs beside a chat: how it answers, with which adapters; those that do nothing now say so."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from onecard.config.chat import IN_CHINESE, ChatConfig
from onecard.config.generation import BASE, MIX, TRAINED, Mixture
from onecard.data import template
from onecard.inference.chat import Chat
from onecard.ui import forms, page
from onecard.ui import sessions as ui_sessions
from onecard.ui import status as ui_status

ANSWER = [
    "mode",
    "num_beams",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "max_new_tokens",
]
MORE = ["min_new_tokens", "no_repeat_ngram_size", "stop", "banned", "seed"]
PLACES = "answers"  # all buttons that ask share them
LOWEST, HIGHEST = 0.0, 2.0  # weights that the sliders of adapters go to
MEMORY = ["max_memory", "last_turns"]


def answer(chat: Chat, options: ChatConfig, memory: Sequence[str] = ()) -> dict[str, gr.Component]:
    """The inputs of an answer's options: the usual ones open, the others folded."""
    modes, lang = {"mode": chat.modes()}, options.lang
    made = forms.inputs(options, ANSWER, lang, modes)
    with gr.Accordion(forms.text(lang, "More", "更多"), open=False, elem_id="more"):
        made |= forms.inputs(options, [*MORE, *memory], lang, modes)
    return made


def picker(chat: Chat, lang: str) -> list[gr.Component]:
    """Which adapter answers, and one weight for each that is loaded."""
    names = chat.engine.adapters
    several = [MIX] if len(names) > 1 else []
    given = dict(chat.mixture)
    choice = gr.Dropdown(
        [(shown(name, lang), name) for name in (BASE, *names, *several)],
        value=choice_of(chat.mixture),
        label=forms.text(lang, "Adapter", "适配器"),
        elem_id="adapter",
        interactive=bool(names),
        info=None if names else forms.text(lang, "none is loaded: --lora_path", "未加载：--lora_path"),
    )
    weights = []
    if names:
        title = forms.text(lang, "Weights of the adapters", "适配器权重")
        can = weighing(chat, [choice.value], lang)
        with gr.Accordion(title, open=False, elem_id="weights"):
            weights = [_weight(name, given.get(name, 1.0), can[name]) for name in names]
    return [choice, *weights]


def shown(choice: str, lang: str) -> str:
    """What a reader sees of a picker's choice."""
    return forms.text(lang, choice, IN_CHINESE.get(choice, choice))


def weighing(chat: Chat, choices: Sequence[str], lang: str) -> dict[str, dict[str, Any]]:
    """Whether each adapter's weight has an effect when these are chosen, and why not."""
    found = {}
    for name in chat.engine.adapters:
        can = name in choices or MIX in choices
        why = "" if can else forms.text(lang, "this adapter is not chosen", "未选择此适配器")
        found[name] = {"interactive": can, "info": why}
    return found


def restored(
    chat: Chat, mixtures: dict[str, Mixture], now: list[float]
) -> tuple[dict[str, str], list[float], list[tuple[str, str]]]:
    """What the pickers show for these mixtures: the choice of each side, the weights, what they cannot show.

    now: the weights that the sliders have.
    """
    names, given, notes = chat.engine.adapters, dict(chat.mixture), []
    weights = dict(zip(names, now, strict=True))
    choices = {side: choice_of(mixture) for side, mixture in mixtures.items()}
    for side, mixture in mixtures.items():
        if choices[side] == MIX:
            weights |= dict.fromkeys(names, 0.0)
        weights |= {name: _on_slider(weight, given.get(name, 1.0)) for name, weight in mixture}
    for side, mixture in mixtures.items():
        if dict(mixture_of(choices[side], weights, names)) != dict(mixture):
            told = " + ".join(f"{name}:{weight:g}" for name, weight in mixture)
            notes.append((f"the weights {told} are more than the sliders can show",
                          f"滑块无法表示权重 {told}"))  # fmt: skip
    return choices, [weights[name] for name in names], notes


def templates(chat: Chat, lang: str) -> gr.Dropdown:
    """Which prompt template the next answers have."""
    trained = forms.text(lang, f"as trained ({chat.template.name})", f"训练时的模板（{chat.template.name}）")
    return gr.Dropdown(
        [(trained, TRAINED), *template.names()],
        value=TRAINED,
        label=forms.text(lang, "Prompt template", "提示模板"),
        elem_id="template",
    )


def _on_slider(weight: float, start: float) -> float:
    """The weight, or the slider's end that is next to it."""
    return min(max(weight, min(LOWEST, start)), max(HIGHEST, start))


def _weight(name: str, value: float, can: dict[str, Any]) -> gr.Slider:
    return gr.Slider(min(LOWEST, value), max(HIGHEST, value), value, step=0.05, label=name, **can)


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
    """Work that shows Stop instead of Send while it goes on, and leaves alone what would disturb it.

    others: what cannot be used meanwhile; status: where it is told that too many wait already; focus:
    JavaScript at the end.
    """
    busy = forms.text(
        lang,
        "Too many questions are waiting: yours was not taken. Ask again in a moment.",
        "等待回答的问题太多，您的问题未被接受，请稍后再试。",
    )

    def swap(on: bool) -> list[Any]:
        shown = [gr.update(visible=not on), gr.update(visible=on)]
        return [*shown, *(gr.update(interactive=not on) for _ in others)]

    def begin(request: gr.Request) -> list[Any]:
        sessions.begin(request.session_hash)
        return swap(True)

    @functools.wraps(work)  # gradio looks what it takes
    def turn(request: gr.Request, *values: Any) -> Iterator[Any]:
        sessions.start(request.session_hash)
        yield from ui_sessions.STEPS.each(work(request, *values))

    def end(request: gr.Request) -> list[Any]:
        sessions.end(request.session_hash)
        return swap(False)

    def fail(request: gr.Request) -> list[Any]:
        refused = sessions.is_waiting(request.session_hash)  # the queue was full: its turn never came
        return [*end(request), ui_status.status(busy, True) if refused else gr.skip()]

    changed = [send, stop, *others]
    taken = gr.on(triggers, begin, None, changed, **page.QUICK)
    done = taken.then(turn, inputs, outputs, concurrency_id=PLACES, **page.LONG)
    ended = done.then(end, None, changed, **page.QUICK)
    done.failure(fail, None, [*changed, status], **page.QUICK)  # then() is not for those
    if focus:
        ended.then(None, js=focus)


def halting(
    stop: gr.Button, window: gr.Blocks, sessions: ui_sessions.Sessions, status: gr.HTML, lang: str
) -> None:
    """Stop, and a page that is closed, end the answer that this page asked for.

    One that waits behind others is given back when its turn comes; the status line says so.
    """
    waits = forms.text(lang, "stopped; waiting for others to finish", "已停止，等待其他回答结束")

    def leave(request: gr.Request) -> None:
        sessions.stop(request.session_hash)

    def halt(request: gr.Request) -> Any:
        waiting = sessions.is_waiting(request.session_hash)
        leave(request)
        return ui_status.status(waits) if waiting else gr.skip()

    stop.click(halt, None, status, **page.QUICK)
    window.unload(leave)


def wire(
    window: gr.Blocks, chat: Chat, options: ChatConfig, inputs: dict[str, gr.Component], reset: gr.Button
) -> None:
    """Controls that do nothing in a mode are disabled and say why; one button puts all back."""
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


def system_for(chat: Chat, shape: str, system: str, lang: str) -> tuple[str, str]:
    """The system prompt as far as a template holds one, and what to say when it does not; raises UserError.

    shape: name of the template.
    """
    form = chat.template_of(shape)
    if not system or form.system is not None:
        return system, ""
    if lang == "zh":
        return "", f"模板 {form.name} 没有系统提示，已略去"
    return "", f"the system prompt is left out: template {form.name} has none"


def mixture_of(choice: str, weights: dict[str, float], names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Adapters of a picker: the base alone, one of them, or all with a weight."""
    if choice in names:
        return ((choice, weights.get(choice, 1.0)),)
    if choice == MIX:
        return tuple((name, weights.get(name, 1.0)) for name in names if weights.get(name, 1.0))
    return ()


def choice_of(mixture: tuple[tuple[str, float], ...]) -> str:
    return BASE if not mixture else mixture[0][0] if len(mixture) == 1 else MIX
