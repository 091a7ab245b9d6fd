"""The single-turn window: an instruction with an optional input, the answer as it grows, all beams."""

import gradio as gr

from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.inference import detokenizer, transcript
from onecard.inference.chat import Chat
from onecard.ui import chat_controls, forms, page
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


def single(chat: Chat, options: ChatConfig) -> gr.Blocks:
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
                about = gr.Textbox(
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
                status = gr.HTML(ui_status.status(""), elem_id="status")
                with gr.Accordion(text("All beams", "所有束"), open=False, elem_id="beams-box"):
                    beams = gr.HTML(elem_id="beams")
                gr.Examples(
                    EXAMPLES, [instruction, about], label=text("Examples", "示例"), api_visibility="private"
                )
            with gr.Column(scale=2, min_width=280):
                adapters = chat_controls.picker(chat, lang)
                shape = chat_controls.templates(chat, lang)
                inputs = chat_controls.answer(chat, options)
                reset = gr.Button(text("Reset parameters", "重置参数"), size="sm", elem_id="reset")

        def answer(request: gr.Request, question: str, subject: str, choice: str, shape: str, *values):
            weights = dict(zip(chat.engine.adapters, values[len(inputs) :], strict=True))
            try:
                settings = forms.read(inputs, values[: len(inputs)])
                if not question.strip():
                    raise UserError(text("Write an instruction first.", "请先写指令。"))
                system, note = chat_controls.system_for(chat, shape, options.system, lang)
            except UserError as error:
                yield gr.skip(), gr.skip(), ui_status.status(str(error), True)
                return
            asked = transcript.conversation([{"question": question, "input": subject}], system)
            mixture = chat_controls.mixture_of(choice, weights, chat.engine.adapters)
            growing = ui_sessions.answers(
                sessions, request.session_hash, chat, asked, settings, mixture, lang, shape
            )
            for reply, told, wrong in growing:
                told, wrong = ui_status.together({"": (reply, told, wrong)}, {}, note)
                yield ui_html.growing(reply), ui_html.beams(reply), ui_status.status(told, wrong)

        chat_controls.answering(
            [send.click, instruction.submit],
            answer,
            [instruction, about, adapters[0], shape, *inputs.values(), *adapters[1:]],
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
            lambda: ("", "", ui_html.growing(detokenizer.Text("")), "", ui_status.status("")),
            None,
            [instruction, about, output, beams, status],
            **page.QUICK,
        )
        copy.click(None, js=page.COPY)
        adapters[0].change(
            lambda choice: [
                gr.update(**can) for can in chat_controls.weighing(chat, [choice], lang).values()
            ],
            adapters[0],
            adapters[1:],
            **page.QUICK,
        )
        chat_controls.wire(window, chat, options, inputs, reset)
    return window
