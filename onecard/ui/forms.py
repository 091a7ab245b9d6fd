"""Declared options -> Gradio inputs, and their values back -> checked options. It knows no option by name."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from onecard.config import options as config_options
from onecard.config.declaration import Option, Options, Text, declared
from onecard.config.generation import Generation
from onecard.errors import UserError


def text(lang: str, english: str, chinese: str) -> str:
    """One of two texts, by the language of the window."""
    return chinese if lang == "zh" else english


def words(settings: type[Options], name: str, lang: str) -> dict[str, str]:
    """Label and help of an option, as an input takes them; raises AssertionError without a label."""
    option = declared(settings)[name]
    assert option.label, f"{name} is declared for the command line alone"
    return {"label": text(lang, *option.label), "info": text(lang, *option.help)}


def inputs(
    start: Options, names: Sequence[str], lang: str, choices: dict[str, list[Any]]
) -> dict[str, gr.Component]:
    """An input for each named option, with the value it has in `start`, made inside the open gradio block.

    choices: of options whose values are fewer here than declared.
    """
    fields = {field.name: field for field in dataclasses.fields(start)}
    return {
        name: _input(start, fields[name], getattr(start, name), lang, choices.get(name)) for name in names
    }


def _input(
    start: Options, field: dataclasses.Field[Any], value: Any, lang: str, fewer: list[Any] | None
) -> gr.Component:
    option: Option = field.metadata["option"]
    what = {"value": value, "elem_id": f"option-{field.name}", "interactive": True}
    what |= words(type(start), field.name, lang)
    if option.slider:
        low, high, step = _ends(option.slider, value)
        return gr.Slider(minimum=low, maximum=high, step=step, **what)
    if option.choices:
        return gr.Radio(fewer or list(option.choices), **what)
    if field.type is bool:
        return gr.Checkbox(**what)
    if field.type is int:
        return gr.Number(precision=0, **what)
    return gr.Textbox(**{**what, "value": "" if value is None else str(value)})


def read(inputs: Mapping[str, gr.Component], values: Sequence[Any]) -> Generation:
    """The options of an answer out of their inputs; raises UserError naming every wrong one."""
    types = {field.name: field.type for field in dataclasses.fields(Generation)}
    texts = dict(zip(inputs, values, strict=True))
    filled = {
        name: value
        for name, value in texts.items()
        if value is not None and (value != "" or types[name] is str)
    }
    try:
        return config_options.build(Generation, filled)
    except UserError as error:
        raise UserError(in_labels(error, inputs)) from None


def in_labels(error: UserError, inputs: Mapping[str, gr.Component]) -> str:
    """What is wrong, with the options called as they are in the window."""

    def with_label(match: re.Match[str]) -> str:
        component = inputs.get(match[1])
        return f"{component.label} ({match[0]})" if component else match[0]

    return re.sub(r"--(\w+)", with_label, str(error).removesuffix(" See --help."))


def clamped(options: Generation, names: Sequence[str], start: Options) -> tuple[list[Any], list[Text]]:
    """Values for the inputs that were made from `start`, and a note for each that was beyond its slider."""
    facts = declared(type(start))
    values, notes = [], []
    for name in names:
        value, option = getattr(options, name), facts[name]
        if option.slider and option.label:
            low, high, _ = _ends(option.slider, getattr(start, name))
            if not low <= value <= high:
                inside = min(max(value, low), high)
                english, chinese = option.label
                notes.append((f"{english} {value} is beyond the slider: {inside}",
                              f"{chinese} {value} 超出滑块范围，取 {inside}"))  # fmt: skip
                value = inside
        values.append(value)
    return values, notes


def _ends(slider: tuple[float, float, float], value: float) -> tuple[float, float, float]:
    """From, to and step of a slider that can show the value it begins with."""
    low, high, step = slider
    return min(low, value), max(high, value), step


def usable(names: Sequence[str], unused: Mapping[str, Text], start: Options, lang: str) -> list[Any]:
    """Updates that disable the inputs without effect, each with the reason, and enable the others."""
    updates = []
    for name in names:
        reason = unused.get(name)
        info = text(lang, *reason) if reason else words(type(start), name, lang)["info"]
        updates.append(gr.update(interactive=reason is None, info=info))
    return updates
