"""A chat as a file that the browser saves and loads, and as what its tab keeps over a reload."""

import json
from pathlib import Path
from typing import Any

import gradio as gr

from onecard.errors import UserError
from onecard.inference import transcript
from onecard.inference.transcript import LEFT, RIGHT, Turns
from onecard.ui import adapter_picker, chat_inputs, forms
from onecard.ui import html as ui_html
from onecard.ui.chat_layout import ChatLayout
from onecard.ui.chat_view import ChatView


class SavedChats:
    """What Save chat, Load chat and a reload do; the server keeps no chat."""

    def __init__(self, layout: ChatLayout, view: ChatView):
        self.layout, self.view, self.text = layout, view, layout.text

    def save(self, turns: Turns, *values: Any) -> tuple[str, str]:
        """The line that the browser saves ('' if there is none), and the status line."""
        try:
            inputs = chat_inputs.read(self.layout, values)
            if not turns:
                raise UserError(self.text("There is nothing to save yet.", "还没有可保存的内容。"))
        except UserError as error:
            return "", ui_html.status_line(str(error), True)
        layout = self.layout
        made_by = (inputs.options, layout.chat, layout.options, inputs.adapters, inputs.template_name)
        line = transcript.record(turns, *made_by, system=inputs.system, context=inputs.context)
        return line, ui_html.status_line(self.text("Saved by your browser.", "已由浏览器保存。"))

    def load(self, path: str, *weights: float) -> list[Any]:
        """Values of the view's outputs and of layout.side() that show a saved chat.

        path: an uploaded file, which is deleted; weights: of the sliders now. What cannot be restored here is
        named in the status line.
        """
        layout, file = self.layout, Path(path)
        outputs = self.view.outputs()
        try:
            saved, notes = transcript.fitted(transcript.load(file), layout.chat)
        except (UserError, OSError) as error:
            unchanged = [gr.skip()] * (len(outputs) + len(layout.side()))
            unchanged[outputs.index(layout.status)] = ui_html.status_line(str(error), True)
            return unchanged
        finally:
            file.unlink(missing_ok=True)
        options, beyond_sliders = forms.clamped(saved.options, list(layout.inputs), layout.options)
        choices, sliders, inexact = adapter_picker.restored(
            layout.chat, saved.adapters_by_side, list(weights)
        )
        notes = [*notes, *beyond_sliders, *inexact]
        pickers = [gr.skip() if saved.template is None else saved.template, choices.get(LEFT, gr.skip())]
        pickers += [RIGHT in choices, choices.get(RIGHT, gr.skip())] if choices else [gr.skip()] * 2
        message = self.text("Loaded.", "已载入。")
        if notes:
            differences = "; ".join(self.text(*note).rstrip(".") for note in notes)
            english = f"Loaded, with differences from the saved chat: {differences}."
            message = self.text(english, f"已载入，但与保存时不同：{differences}。")
        texts = [saved.texts["system"], saved.texts["context"]]
        shown = self.view.update(saved.turns, message, bool(notes), clear_beams=True)
        return [*shown, *texts, *pickers, *options, *sliders]

    def reopen(self, stored: str) -> list[Any]:
        """Values of the view's outputs for what this tab has stored; what is no chat is left out."""
        try:
            turns = transcript.turns_of(json.loads(stored or "[]"))
        except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            turns = []
        return self.view.update(turns)
