"""What the inputs beside a chat are set to when a button is pressed. It changes no component."""

import dataclasses
from typing import Any

from onecard.config.generation import ActiveAdapters, Generation
from onecard.inference.transcript import LEFT, RIGHT
from onecard.ui import adapter_picker, chat_controls, forms
from onecard.ui.chat_layout import ChatLayout


@dataclasses.dataclass(frozen=True)
class ChatInputs:
    """Everything beside the chat that the next answer depends on."""

    options: Generation
    template_name: str
    system: str
    context: str
    adapters: dict[str, ActiveAdapters]  # of LEFT, and of RIGHT when two answers are compared
    note: str = ""  # names what could not be used


def read(layout: ChatLayout, values: tuple[Any, ...]) -> ChatInputs:
    """Read the values of layout.side(), in that order; raises UserError that names every wrong option."""
    system, context, template_name, left, compare, right, *rest = values
    loaded = layout.chat.engine.adapters
    option_values, slider_values = rest[: len(layout.inputs)], rest[len(layout.inputs) :]
    weights = dict(zip(loaded, slider_values, strict=True))
    adapters = {LEFT: adapter_picker.active_adapters(left, weights, loaded)}
    if compare:
        adapters[RIGHT] = adapter_picker.active_adapters(right, weights, loaded)
    options = forms.read(layout.inputs, option_values)
    system, note = chat_controls.usable_system(
        layout.chat, template_name, (system or "").strip(), layout.lang
    )
    return ChatInputs(options, template_name, system, (context or "").strip(), adapters, note)
