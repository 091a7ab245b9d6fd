"""Declared options -> Gradio inputs, and their values back -> checked options. It knows no option by name."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from onecard.config import options as config_options
from onecard.config.generation import Generation
from onecard.errors import UserError


def text(lang: str, english: str, chinese: str) -> str:
    """One of two texts, by the language of the window."""
    return chinese if lang == "zh" else english


def inputs(start: Any, names: list[str], lang: str, choices: dict[str, list[Any]]) -> dict[str, gr.Component]:
    """An input for each named option, with the value it has in `start`; made where gradio stands now.

    choices: of options whose values are fewer here than declared.
    """
    fields = {field.name: field for field in dataclasses.fields(start)}
    return {name: _input(fields[name], getattr(start, name), lang, choices.get(name)) for name in names}


def _input(field: dataclasses.Field, value: Any, lang: str, fewer: list[Any] | None) -> gr.Component:
    meta = field.metadata
    label = text(lang, *(meta["label"] or (field.name, field.name)))
    what = {"label": label, "value": value, "elem_id": f"option-{field.name}", "interactive": True}
    what["info"] = text(lang, meta["help"], meta["chinese"])
    if meta["slider"]:
        low, high, step = _ends(meta["slider"], value)
        return gr.Slider(minimum=low, maximum=high, step=step, **what)
    if meta["choices"]:
        return gr.Radio(fewer or list(meta["choices"]), **what)
    if field.type is bool:
        return gr.Checkbox(**what)
    if field.type is int:
        return gr.Number(precision=0, **what)
    return gr.Textbox(**{**what, "value": "" if value is None else str(value)})


def read(inputs: Mapping[str, gr.Component], values: Sequence[Any]) -> Generation:
    """The options of an answer out of their inputs; raises UserError naming every wrong one."""
    types = {field.name: field.type for field in dataclasses.fields(Generation)}
    given = dict(zip(inputs, values, strict=True))
    given = {name: value for name, value in given.items() if value != "" or types[name] is str}
    try:
        return config_options.build(
            Generation, {name: value for name, value in given.items() if value is not None}
        )
    except UserError as error:
        raise UserError(told(error, inputs)) from None


def told(error: UserError, inputs: Mapping[str, gr.Component]) -> str:
    """What is wrong, with the options called as they are in the window."""

    def with_label(match: re.Match[str]) -> str:
        component = inputs.get(match[1])
        return f"{component.label} ({match[0]})" if component else match[0]

    return re.sub(r"--(\w+)", with_label, str(error).removesuffix(" See --help."))


def clamped(options: Generation, names: list[str], start: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """Values for the inputs that were made from `start`, and what was beyond a slider's end."""
    fields = {field.name: field for field in dataclasses.fields(start)}
    values, notes = [], []
    for name in names:
        value, meta = getattr(options, name), fields[name].metadata
        if meta["slider"]:
            low, high, _ = _ends(meta["slider"], getattr(start, name))
            if not low <= value <= high:
                inside = min(max(value, low), high)
                english, chinese = meta["label"]
                notes.append((f"{english} {value} is beyond the slider: {inside}",
                              f"{chinese} {value} 超出滑块范围，取 {inside}"))  # fmt: skip
                value = inside
        values.append(value)
    return values, notes


def _ends(slider: tuple[float, float, float], value: float) -> tuple[float, float, float]:
    """From, to and step of a slider that can show the value it begins with."""
    low, high, step = slider
    return min(low, value), max(high, value), step


def usable(names: list[str], unused: dict[str, tuple[str, str]], start: Any, lang: str) -> list[Any]:
    """Updates that disable the inputs which do nothing now, each with the reason, and enable the others."""
    fields = {field.name: field for field in dataclasses.fields(start)}
    updates = []
    for name in names:
        why = unused.get(name)
        meta = fields[name].metadata
        info = text(lang, *(why or (meta["help"], meta["chinese"])))
        updates.append(gr.update(interactive=why is None, info=info))
    return updates
