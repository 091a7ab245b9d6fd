"""The chat window: a conversation with its tools, and two adapters side by side on request.

A chat is kept in its browser's tab: a reload shows it again, no other tab sees it, the server keeps none.
"""

import json
from collections.abc import Callable
from typing import Any

import gradio as gr

from onecard.config.chat import ChatConfig
from onecard.config.generation import BASE, TRAINED
from onecard.inference.chat import Chat
from onecard.inference.transcript import Turns
from onecard.ui import adapter_picker, chat_controls, forms, page
from onecard.ui import html as ui_html
from onecard.ui.chat_answers import ChatAnswers
from onecard.ui.chat_layout import ChatLayout
from onecard.ui.chat_view import ChatView
from onecard.ui.saved_chats import SavedChats
from onecard.ui.sessions import Sessions

TOO_LONG = (
    "This chat is too long for your browser to keep: save it, or a reload loses it.",
    "对话过长，浏览器无法保留：请保存，否则刷新后会丢失。",
)


class ChatWindow:
    """Which event of the components does what."""

    def __init__(self, window: gr.Blocks, chat: Chat, options: ChatConfig):
        """window: the whole page."""
        self.layout = ChatLayout(chat, options)
        self.view = ChatView(self.layout)
        self.sessions = Sessions()
        self.answers = ChatAnswers(self.layout, self.view, self.sessions)
        self.saved_chats = SavedChats(self.layout, self.view)
        self._wire_answers(window)
        self._wire_turns()
        self._wire_side()
        self._wire_storage(window)
        chat_controls.wire(window, chat, options, self.layout.inputs, self.layout.reset)

    def new_session(self) -> list[Any]:
        """No turns, and everything beside them as the program was started."""
        layout = self.layout
        chat, start = layout.chat, dict(layout.chat.active_adapters)
        options = [getattr(layout.options, name) for name in layout.inputs]
        weights = [start.get(name, 1.0) for name in chat.engine.adapters]
        pickers = [TRAINED, adapter_picker.choice_of(chat.active_adapters), False, BASE]
        shown = self.view.update([], box="", clear_beams=True)
        return [*shown, layout.options.system, "", *pickers, *options, *weights]

    def side_by_side(self, left: str, compare: bool, right: str) -> list[Any]:
        """Two chats with their adapters' names, or one without; and which weights have an effect."""
        chat, lang = self.layout.chat, self.layout.lang
        choices = [left, right] if compare else [left]
        weights = adapter_picker.usable_weights(chat, choices, lang).values()
        left_chat = gr.update(show_label=compare, label=adapter_picker.shown(left, lang))
        right_chat = gr.update(visible=compare, label=adapter_picker.shown(right, lang))
        return [left_chat, right_chat, gr.update(visible=compare), *(gr.update(**one) for one in weights)]

    def edit_last(self, box: str, context: str, turns: Turns) -> list[Any]:
        """Put the last question and its context back into their boxes, unless other text is typed there."""
        turn_context, reason = turns[-1].get("input", "") if turns else "", None
        if not turns:
            reason = "There is no question yet.", "还没有提问。"
        elif turn_context and context.strip() not in ("", turn_context):
            reason = (
                "The context box has changed since this question: save or remove its text first.",
                "背景已更改，请先保存或删除。",
            )
        elif box.strip():
            reason = (
                "Your message is not sent yet: send or remove it first.",
                "内容尚未发送，请先发送或删除。",
            )
        if reason:
            return [*self.view.refusal(turns, *reason), gr.skip()]
        shown = self.view.update(turns[:-1], box=turns[-1]["question"], clear_beams=True)
        return [*shown, turn_context or gr.skip()]

    def _wire_answers(self, window: gr.Blocks) -> None:
        layout, answers, outputs = self.layout, self.answers, self.view.outputs()
        buttons = layout.disturbing()

        def wire(
            triggers: list[Any],
            work: Callable[..., Any],
            inputs: list[Any],
            outputs: list[Any],
            *written: gr.Component,
        ) -> None:
            parts = [layout.send, layout.stop, [*buttons, *written], layout.status, layout.lang, page.FOCUS]
            chat_controls.answering(triggers, work, inputs, outputs, self.sessions, *parts)

        inputs = [layout.box, layout.state, *layout.side()]
        wire([layout.send.click, layout.box.submit], answers.ask, inputs, outputs)
        wire([layout.retry.click], answers.retry, inputs, outputs)
        wire([layout.go_on.click], answers.go_on, inputs, outputs)
        summarised = [layout.state, *layout.side()], [*outputs, layout.context]
        wire([layout.summarise.click], answers.summarise, *summarised, layout.context)
        chat_controls.halting(layout.stop, window, self.sessions, layout.status, layout.lang)

    def _wire_turns(self) -> None:
        layout, outputs = self.layout, self.view.outputs()

        def delete_last(turns: Turns) -> list[Any]:
            return self.view.update(turns[:-1], clear_beams=True)

        def clear() -> list[Any]:
            return self.view.update([], clear_beams=True)

        typed = [layout.box, layout.context, layout.state]
        layout.edit.click(self.edit_last, typed, [*outputs, layout.context], **page.QUICK)
        layout.delete.click(delete_last, layout.state, outputs, **page.QUICK)
        for trigger in (layout.clear.click, layout.left.clear, layout.right.clear):
            trigger(clear, None, outputs, **page.QUICK)
        layout.new.click(self.new_session, None, [*outputs, *layout.side()], **page.QUICK)

    def _wire_side(self) -> None:
        layout = self.layout
        pickers = [layout.adapter, layout.compare, layout.against]
        sides = [layout.left, layout.right, layout.against, *layout.weights]
        gr.on([picker.change for picker in pickers], self.side_by_side, pickers, sides, **page.QUICK)

        def close_system_prompt(template_name: str) -> dict[str, Any]:
            return gr.update(**layout.system_prompt_state(template_name))

        layout.template.change(close_system_prompt, layout.template, layout.system, **page.QUICK)

    def _wire_storage(self, window: gr.Blocks) -> None:
        layout, outputs, saved_chats = self.layout, self.view.outputs(), self.saved_chats
        saving = layout.save.click(
            saved_chats.save,
            [layout.state, *layout.side()],
            [layout.download, layout.status],
            **page.QUICK,
        )
        saving.then(None, layout.download, None, js=page.DOWNLOAD)
        loaded = [*outputs, *layout.side()]
        layout.load.upload(saved_chats.load, [layout.load, *layout.weights], loaded, **page.QUICK)
        warning = json.dumps(ui_html.status_line(layout.text(*TOO_LONG), True))
        layout.stored.change(None, layout.stored, layout.storage_warning, js=page.KEEP_CHAT % warning)
        texts = [layout.context, layout.system]
        for text in texts:
            text.change(None, texts, None, js=page.KEEP_TEXTS)
        # by the browser alone: what is typed while the page opens must not wait for the server
        window.load(None, texts, texts, js=page.KEPT_TEXTS)
        window.load(saved_chats.reopen, layout.stored, outputs, js=page.KEPT_CHAT, **page.QUICK)


def build_page(chat: Chat, options: ChatConfig, training: Callable[[str], None] | None = None) -> gr.Blocks:
    """The page of interaction.py; training: builds the training window, which gets a tab of its own."""
    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        if training is None:
            ChatWindow(window, chat, options)
        else:
            with gr.Tab(forms.text(options.lang, "Chat", "对话")):
                ChatWindow(window, chat, options)
            with gr.Tab(forms.text(options.lang, "Training", "训练"), elem_id="training"):
                training(options.lang)
    return window
