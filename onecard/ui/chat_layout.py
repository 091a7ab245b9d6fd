"""The components of the chat window and where they stand; ui/chat_window.py says what they do."""

from typing import Any

import gradio as gr

from onecard.config.chat import ChatConfig
from onecard.config.generation import BASE, TRAINED
from onecard.errors import UserError
from onecard.inference.chat import Chat
from onecard.ui import adapter_picker, chat_controls, forms, page
from onecard.ui import html as ui_html

MATH = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


class ChatLayout:
    """The components, created inside the gr.Blocks or gr.Tab that is open."""

    def __init__(self, chat: Chat, options: ChatConfig):
        self.chat, self.options, self.lang = chat, options, options.lang
        self.state = gr.State([])
        self.stored = gr.Textbox(visible="hidden", elem_id="kept")  # the chat as JSON, for the tab's storage
        page.head(self.text("chat", "对话"), self.lang)
        with gr.Row():
            with gr.Column(scale=3):
                self._lay_out_chat()
            with gr.Column(scale=2, min_width=280):
                self._lay_out_side()
        self.download = gr.Textbox(visible="hidden")  # the line that Save chat hands to the browser

    def text(self, english: str, chinese: str) -> str:
        return forms.text(self.lang, english, chinese)

    def button(self, name: str, english: str, chinese: str, **more: Any) -> gr.Button:
        return gr.Button(self.text(english, chinese), elem_id=name, **{"size": "sm", **more})

    def chatbot(self, name: str, **more: Any) -> gr.Chatbot:
        return gr.Chatbot(
            elem_id=name,
            height="60vh",
            latex_delimiters=MATH,
            allow_tags=False,
            buttons=["copy"],
            feedback_options=None,
            placeholder=self.text("Ask something.", "问点什么吧。"),
            **more,
        )

    def _lay_out_chat(self) -> None:
        with gr.Row():
            self.left = self.chatbot("left", show_label=False)
            self.right = self.chatbot("right", visible=False, label=adapter_picker.shown(BASE, self.lang))
        self.status = gr.HTML(ui_html.status_line(""), elem_id="status")
        self.storage_warning = gr.HTML("", elem_id="unkept")
        self.box = gr.Textbox(
            show_label=False,
            placeholder=self.text("Your message (Shift-Enter: new line)", "输入消息（Shift-Enter 换行）"),
            lines=1,
            max_lines=12,
            elem_id="box",
            autofocus=True,
        )
        with gr.Row(elem_classes="narrow"):
            self.send = self.button("send", "Send", "发送", variant="primary")
            self.stop = self.button("stop", "Stop", "停止", variant="stop", visible=False)
            self.retry = self.button("retry", "Retry", "重试")
            self.edit = self.button("edit", "Edit last", "编辑上一条")
            self.delete = self.button("delete", "Delete last", "删除上一轮")
            self.clear = self.button("clear", "Clear", "清空")
            self.new = self.button("new", "New session", "新会话")
        with gr.Row(elem_classes="narrow"):
            self.go_on = self.button("continue", "Continue", "继续")
            self.summarise = self.button("summarise", "Summarise", "总结")
            self.save = self.button("save", "Save chat", "保存对话")
            self.load = gr.UploadButton(
                self.text("Load chat", "载入对话"), size="sm", file_types=[".jsonl"], elem_id="load"
            )
        with gr.Accordion(self.text("All beams", "所有束"), open=False):
            self.beams = gr.HTML(elem_id="beams")

    def _lay_out_side(self) -> None:
        names = self.chat.engine.adapters
        self.adapter, *self.weights = adapter_picker.picker(self.chat, self.lang)
        self.template = chat_controls.template_picker(self.chat, self.lang)
        self.compare = gr.Checkbox(
            False, label=self.text("Compare two adapters", "对比两个适配器"), elem_id="compare"
        )
        self.against = gr.Dropdown(
            [(adapter_picker.shown(name, self.lang), name) for name in (BASE, *names)],
            value=BASE,
            visible=False,
            label=self.text("Compare with", "对比对象"),
            elem_id="against",
        )
        self.system = gr.Textbox(
            value=self.options.system,
            label=forms.words(type(self.options), "system", self.lang)["label"],
            **self.system_prompt_state(TRAINED),
            lines=2,
            elem_id="system",
        )
        self.context = gr.Textbox(
            label=self.text("Context (sent with your next questions)", "背景（随后续提问一起给出）"),
            lines=2,
            elem_id="context",
        )
        self.inputs = chat_controls.answer(self.chat, self.options, several_turns=True)
        self.reset = self.button("reset", "Reset parameters", "重置参数")

    def system_prompt_state(self, template_name: str) -> dict[str, Any]:
        """Whether the box for the system prompt can be used with a template, and why not."""
        try:
            template = self.chat.template_of(template_name)
        except UserError as error:  # it is shown again when a question is asked
            return {"interactive": True, "info": str(error)}
        is_usable = template.system is not None
        reason = self.text(
            f"template {template.name} has no place for it", f"模板 {template.name} 没有系统提示"
        )
        return {"interactive": is_usable, "info": "" if is_usable else reason}  # None would change nothing

    def side(self) -> list[gr.Component]:
        """What goes with every question, in the order that chat_inputs.read expects."""
        return [self.system, self.context, *self.pickers(), *self.inputs.values(), *self.weights]

    def pickers(self) -> list[gr.Component]:
        """Template, adapter, whether two are compared, and the second one."""
        return [self.template, self.adapter, self.compare, self.against]

    def disturbing(self) -> list[gr.Component]:
        """What would disturb an answer that is growing."""
        changing = [self.box, self.retry, self.edit, self.delete, self.clear, self.new]
        return [*changing, self.go_on, self.summarise, self.load]
