"""Which adapters answer: the inputs that choose them, and what a choice means as active adapters."""

from collections.abc import Sequence
from typing import Any

import gradio as gr

from onecard.config.chat import IN_CHINESE
from onecard.config.generation import BASE, MIX, ActiveAdapters
from onecard.inference.chat import Chat
from onecard.ui import forms

LOWEST, HIGHEST = 0.0, 2.0  # the weights that a slider reaches


def picker(chat: Chat, lang: str) -> list[gr.Component]:
    """The choice of the adapter that answers, then a weight for each one that is loaded."""
    names = chat.engine.adapters
    several = [MIX] if len(names) > 1 else []
    start = dict(chat.active_adapters)
    choice = gr.Dropdown(
        [(shown(name, lang), name) for name in (BASE, *names, *several)],
        value=choice_of(chat.active_adapters),
        label=forms.text(lang, "Adapter", "适配器"),
        elem_id="adapter",
        interactive=bool(names),
        info=None if names else forms.text(lang, "none is loaded: --lora_path", "未加载：--lora_path"),
    )
    sliders = []
    if names:
        title = forms.text(lang, "Adapter weights", "适配器权重")
        states = usable_weights(chat, [choice.value], lang)
        with gr.Accordion(title, open=False, elem_id="weights"):
            sliders = [_slider(name, start.get(name, 1.0), states[name]) for name in names]
    return [choice, *sliders]


def shown(choice: str, lang: str) -> str:
    """What a reader sees of a choice."""
    return forms.text(lang, choice, IN_CHINESE.get(choice, choice))


def choice_of(adapters: ActiveAdapters) -> str:
    """The choice that stands for these active adapters."""
    return BASE if not adapters else adapters[0][0] if len(adapters) == 1 else MIX


def active_adapters(choice: str, weights: dict[str, float], names: Sequence[str]) -> ActiveAdapters:
    """What a choice means: the base model alone, one adapter, or all whose weight is not 0."""
    if choice in names:
        return ((choice, weights.get(choice, 1.0)),)
    if choice == MIX:
        return tuple((name, weights.get(name, 1.0)) for name in names if weights.get(name, 1.0))
    return ()


def usable_weights(chat: Chat, choices: Sequence[str], lang: str) -> dict[str, dict[str, Any]]:
    """Whether each adapter's weight has an effect with these choices, and why not."""
    reason = forms.text(lang, "this adapter is not chosen", "未选择此适配器")
    states = {}
    for name in chat.engine.adapters:
        is_usable = name in choices or MIX in choices
        states[name] = {"interactive": is_usable, "info": "" if is_usable else reason}
    return states


def restored(
    chat: Chat, sides: dict[str, ActiveAdapters], now: list[float]
) -> tuple[dict[str, str], list[float], list[tuple[str, str]]]:
    """The choice of each side and the weights that show these active adapters, and what cannot be shown.

    now: the weights of the sliders.
    """
    names, start, notes = chat.engine.adapters, dict(chat.active_adapters), []
    weights = dict(zip(names, now, strict=True))
    choices = {side: choice_of(adapters) for side, adapters in sides.items()}
    for side, adapters in sides.items():
        if choices[side] == MIX:
            weights |= dict.fromkeys(names, 0.0)
        weights |= {name: _within_slider(weight, start.get(name, 1.0)) for name, weight in adapters}
    for side, adapters in sides.items():
        if dict(active_adapters(choices[side], weights, names)) != dict(adapters):
            named = " + ".join(f"{name}:{weight:g}" for name, weight in adapters)
            notes.append((f"the sliders cannot show the weights {named}", f"滑块无法表示权重 {named}"))
    return choices, [weights[name] for name in names], notes


def _within_slider(weight: float, start: float) -> float:
    """The weight, or the nearest end of the slider that began at `start`."""
    return min(max(weight, min(LOWEST, start)), max(HIGHEST, start))


def _slider(name: str, value: float, state: dict[str, Any]) -> gr.Slider:
    return gr.Slider(min(LOWEST, value), max(HIGHEST, value), value, step=0.05, label=name, **state)
