"""The window for single instructions: an instruction, an optional input, the growing answer, all beams."""

from typing import Any

import gradio as gr

from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.inference import detokenizer, transcript
from onecard.inference.chat import Chat
from onecard.ui import adapter_picker, chat_controls, forms, page
from onecard.ui import html as ui_html
from onecard.ui import sessions as ui_sessions
from onecard.ui import status as ui_status

EXAMPLES = [
    ["Name three ways to save water in a kitchen.", ""],
    [
        "Shorten this message to one sentence.",
        "The bus was late again today, so I walked and was wet through.",
    ],
    ["用一句话解释什么是显卡。", ""],
    ["Write a short poem about a bicycle in the rain.", ""],
]


def build_page(chat: Chat, options: ChatConfig) -> gr.Blocks:
    """The page of generate.py."""
    lang, sessions = options.lang, ui_sessions.Sessions()

    def text(english: str, chinese: str) -> str:
        return forms.text(lang, english, chinese)

    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        page.head(text("one instruction, one answer", "单轮问答"), lang)
        with gr.Row():
            with gr.Column(scale=3):
                instruction = gr.Textbox(
                    label=text("Instruction", "指令"),
                    lines=3,
                    max_lines=12,
                    placeholder=text("Shift-Enter generates", "Shift-Enter 生成"),
                    elem_id="instruction",
                    autofocus=True,
                )
                context = gr.Textbox(
                    label=text("Input (may be empty)", "输入（可为空）"),
                    lines=2,
                    max_lines=12,
                    elem_id="input",
                )
                with gr.Row(elem_classes="narrow"):
                    send = gr.Button(text("Generate", "生成"), variant="primary", elem_id="send")
                    stop = gr.Button(text("Stop", "停止"), variant="stop", visible=False, elem_id="stop")
                    clear = gr.Button(text("Clear", "清空"), elem_id="clear")
                    copy = gr.Button(text("Copy", "复制"), elem_id="copy")
                gr.Markdown(f"**{text('Answer', '回答')}**")
                output = gr.HTML('<div class="answer"></div>', elem_id="output")
                status = gr.HTML(ui_html.status_line(""), elem_id="status")
                with gr.Accordion(text("All beams", "所有束"), open=False, elem_id="beams-box"):
                    beams = gr.HTML(elem_id="beams")
                gr.Examples(
                    EXAMPLES, [instruction, context], label=text("Examples", "示例"), api_visibility="private"
                )
            with gr.Column(scale=2, min_width=280):
                adapter, *weights = adapter_picker.picker(chat, lang)
                template = chat_controls.template_picker(chat, lang)
                inputs = chat_controls.answer(chat, options)
                reset = gr.Button(text("Reset parameters", "重置参数"), size="sm", elem_id="reset")

        def answer(
            request: gr.Request, question: str, subject: str, choice: str, template_name: str, *values
        ):
            option_values, slider_values = values[: len(inputs)], values[len(inputs) :]
            try:
                settings = forms.read(inputs, option_values)
                if not question.strip():
                    raise UserError(text("Write an instruction first.", "请先写指令。"))
                system, note = chat_controls.usable_system(chat, template_name, options.system, lang)
            except UserError as error:
                yield gr.skip(), gr.skip(), ui_html.status_line(str(error), True)
                return
            conversation = transcript.conversation([{"question": question, "input": subject}], system)
            names = chat.engine.adapters
            active = adapter_picker.active_adapters(
                choice, dict(zip(names, slider_values, strict=True)), names
            )
            updates = ui_sessions.answers(
                sessions, request.session_hash, chat, conversation, settings, active, lang, template_name
            )
            for update in updates:
                message = ui_html.status_line(*ui_status.combined({"": update}, {}, note))
                yield ui_html.growing(update.text), ui_html.beams(update.text), message

        chat_controls.answering(
            [send.click, instruction.submit],
            answer,
            [instruction, context, adapter, template, *inputs.values(), *weights],
            [output, beams, status],
            sessions,
            send,
            stop,
            [clear, instruction],
            status,
            lang,
        )
        chat_controls.halting(stop, window, sessions, status, lang)
        clear.click(
            lambda: ("", "", ui_html.growing(detokenizer.PartialText("")), "", ui_html.status_line("")),
            None,
            [instruction, context, output, beams, status],
            **page.QUICK,
        )
        copy.click(None, js=page.COPY)

        def enable_weights(choice: str) -> list[Any]:
            states = adapter_picker.usable_weights(chat, [choice], lang)
            return [gr.update(**state) for state in states.values()]

        adapter.change(enable_weights, adapter, weights, **page.QUICK)
        chat_controls.wire(window, chat, options, inputs, reset)
    return window
