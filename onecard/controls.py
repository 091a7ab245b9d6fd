"""The inputs beside a chat: how it answers, with which adapters; those that do nothing now say so."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from onecard import form, page, talking
from onecard.chat_config import BASE, MIX, ChatConfig

Chat = Any  # onecard.chat.Chat, which stands above
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
MEMORY = ["max_memory", "last_turns"]


def answer(chat: Chat, options: ChatConfig, memory: Sequence[str] = ()) -> dict[str, gr.Component]:
    """The inputs of an answer's options: the usual ones open, the others folded."""
    modes, lang = {"mode": chat.modes()}, options.lang
    made = form.inputs(options, ANSWER, lang, modes)
    with gr.Accordion(form.say(lang, "More", "更多"), open=False, elem_id="more"):
        made |= form.inputs(options, [*MORE, *memory], lang, modes)
    return made


def picker(chat: Chat, lang: str, start: str | None = None) -> list[gr.Component]:
    """Which adapter answers, and one weight for each that is loaded."""
    names = chat.engine.adapters
    several = [MIX] if len(names) > 1 else []
    given = dict(chat.mixture)
    choice = gr.Dropdown(
        [BASE, *names, *several],
        value=start or talking.choice_of(chat.mixture),
        label=form.say(lang, "Adapter", "适配器"),
        elem_id="adapter",
        interactive=bool(names),
        info=None if names else form.say(lang, "none is loaded: --lora_path", "未加载：--lora_path"),
    )
    weights = []
    if names:
        with gr.Accordion(form.say(lang, "Weights of the adapters", "适配器权重"), open=False):
            weights = [_weight(name, given.get(name, 1.0)) for name in names]
    return [choice, *weights]


def _weight(name: str, value: float) -> gr.Slider:
    return gr.Slider(min(0, value), max(2, value), value, step=0.05, label=name)


def wire(
    window: gr.Blocks, chat: Chat, options: ChatConfig, inputs: dict[str, gr.Component], reset: gr.Button
) -> None:
    """Controls that do nothing in a mode are disabled and say why; one button puts all back."""
    names = list(inputs)
    others = [name for name in names if name != "mode"]

    def enable(mode: str) -> list:
        return form.usable(others, chat.unused(mode), options, options.lang)

    boxes = [inputs[name] for name in others]
    inputs["mode"].change(enable, inputs["mode"], boxes, **page.QUICK)
    window.load(enable, inputs["mode"], boxes, **page.QUICK)
    reset.click(
        lambda: [getattr(options, name) for name in names],
        None,
        list(inputs.values()),
        **page.QUICK,
    )
