"""The single-turn window: an instruction with an optional input, the answer as it grows, all beams."""

import gradio as gr

from onecard import controls, form, page, scripts, talking
from onecard.chat_config import ChatConfig
from onecard.errors import UserError

EXAMPLES = [
    ["Name three ways to save water in a kitchen.", ""],
    [
        "Shorten this message to one sentence.",
        "The bus was late again today, so I walked and was wet through.",
    ],
    ["用一句话解释什么是显卡。", ""],
    ["Write a short poem about a bicycle in the rain.", ""],
]


def single(chat, options: ChatConfig) -> gr.Blocks:
    """The page of generate.py."""
    lang, sessions = options.lang, talking.Sessions()

    def say(english: str, chinese: str) -> str:
        return form.say(lang, english, chinese)

    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        page.head(say("one instruction, one answer", "单轮问答"), lang)
        with gr.Row():
            with gr.Column(scale=3):
                instruction = gr.Textbox(
                    label=say("Instruction", "指令"),
                    lines=3,
                    max_lines=12,
                    placeholder=say("Shift-Enter generates", "Shift-Enter 生成"),
                    elem_id="instruction",
                    autofocus=True,
                )
                about = gr.Textbox(
                    label=say("Input (may be empty)", "输入（可为空）"),
                    lines=2,
                    max_lines=12,
                    elem_id="input",
                )
                with gr.Row(elem_classes="narrow"):
                    send = gr.Button(say("Generate", "生成"), variant="primary", elem_id="send")
                    stop = gr.Button(say("Stop", "停止"), variant="stop", visible=False, elem_id="stop")
                    clear = gr.Button(say("Clear", "清空"), elem_id="clear")
                    copy = gr.Button(say("Copy", "复制"), elem_id="copy")
                gr.Markdown(f"**{say('Answer', '回答')}**")
                output = gr.HTML('<div class="answer"></div>', elem_id="output")
                status = gr.HTML(page.status(""), elem_id="status")
                with gr.Accordion(say("All beams", "所有束"), open=False, elem_id="beams-box"):
                    beams = gr.HTML(elem_id="beams")
                gr.Examples(
                    EXAMPLES, [instruction, about], label=say("Examples", "示例"), api_visibility="private"
                )
            with gr.Column(scale=2, min_width=280):
                adapters = controls.picker(chat, lang)
                shape = controls.templates(chat, lang)
                inputs = controls.answer(chat, options)
                reset = gr.Button(say("Reset parameters", "重置参数"), size="sm", elem_id="reset")

        def answer(request: gr.Request, question: str, subject: str, choice: str, shape: str, *values):
            weights = dict(zip(chat.engine.adapters, values[len(inputs) :], strict=True))
            try:
                settings = form.read(inputs, values[: len(inputs)])
                if not question.strip():
                    raise UserError(say("Write an instruction first.", "请先写指令。"))
                system, note = talking.system_for(chat, shape, options.system, lang)
            except UserError as error:
                yield gr.skip(), gr.skip(), page.status(str(error), True)
                return
            asked = talking.conversation([{"question": question, "input": subject}], system)
            mixture = talking.mixture_of(choice, weights, chat.engine.adapters)
            growing = talking.answers(
                sessions, request.session_hash, chat, asked, settings, mixture, lang, shape
            )
            for text, told, wrong in growing:
                told, wrong = talking.together({"": (text, told, wrong)}, {}, note)
                yield page.growing(text), page.beams(text, lang), page.status(told, wrong)

        controls.answering(
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
        controls.halting(stop, window, sessions, status, lang)
        clear.click(
            lambda: ("", "", page.growing(talking.Text("")), "", page.status("")),
            None,
            [instruction, about, output, beams, status],
            **page.QUICK,
        )
        copy.click(None, js=scripts.COPY)
        adapters[0].change(
            lambda choice: [gr.update(**can) for can in controls.weighing(chat, [choice], lang).values()],
            adapters[0],
            adapters[1:],
            **page.QUICK,
        )
        controls.wire(window, chat, options, inputs, reset)
    return window
