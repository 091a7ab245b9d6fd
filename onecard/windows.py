"""The single-turn window: an instruction with an optional input, the answer as it grows, all beams."""

import gradio as gr

from onecard import controls, form, page, talking
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
        with gr.Row(elem_classes=["narrow", "head"]):
            gr.Markdown(f"## OneCard · {say('one instruction, one answer', '单轮问答')}")
            dark = gr.Button(say("Light / dark", "明 / 暗"), size="sm", scale=0, min_width=90)
        with gr.Row():
            with gr.Column(scale=3):
                instruction = gr.Textbox(
                    label=say("Instruction", "指令"),
                    lines=3,
                    max_lines=12,
                    elem_id="instruction",
                    autofocus=True,
                )
                about = gr.Textbox(
                    label=say("Input (what it is about; may be empty)", "输入（可为空）"),
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
                inputs = controls.answer(chat, options)
                reset = gr.Button(say("Reset parameters", "重置参数"), size="sm", elem_id="reset")

        names = list(inputs)

        def answer(request: gr.Request, question: str, subject: str, choice: str, *values):
            weights = dict(zip(chat.engine.adapters, values[len(names) :], strict=True))
            try:
                settings = form.read(dict(zip(names, values[: len(names)], strict=True)))
                if not question.strip():
                    raise UserError(say("Write an instruction first.", "请先写指令。"))
            except UserError as error:
                yield gr.skip(), gr.skip(), page.status(str(error), True)
                return
            asked = talking.conversation([{"question": question, "input": subject}], options.system)
            mixture = talking.mixture_of(choice, weights, chat.engine.adapters)
            growing = talking.answers(sessions, request.session_hash, chat, asked, settings, mixture, lang)
            for text, told, wrong in growing:
                yield page.growing(text), page.beams(text, lang), page.status(told, wrong)

        def halt(request: gr.Request) -> None:
            sessions.stop(request.session_hash)

        def swap(answering: bool) -> list:
            changed = [gr.update(visible=not answering), gr.update(visible=answering)]
            return [*changed, gr.update(interactive=not answering), gr.update(interactive=not answering)]

        def starts(request: gr.Request) -> list:
            sessions.begin(request.session_hash)
            return swap(True)

        def ends(request: gr.Request) -> list:
            sessions.end(request.session_hash)
            return swap(False)

        buttons = [send, stop, clear, instruction]
        asked = gr.on([send.click, instruction.submit], starts, None, buttons, **page.QUICK)
        run = asked.then(
            answer,
            [instruction, about, adapters[0], *inputs.values(), *adapters[1:]],
            [output, beams, status],
            **page.LONG,
        )
        run.then(ends, None, buttons, **page.QUICK)
        run.failure(ends, None, buttons, **page.QUICK)  # then() is not for those
        stop.click(halt, **page.QUICK)
        clear.click(
            lambda: ("", "", page.growing(talking.Text("")), "", page.status("")),
            None,
            [instruction, about, output, beams, status],
            **page.QUICK,
        )
        copy.click(
            None,
            js="() => { const shown = document.querySelector('#output .answer');"
            " navigator.clipboard.writeText(shown ? shown.innerText : ''); }",
        )
        controls.wire(window, chat, options, inputs, reset)
        dark.click(None, js=page.TOGGLE_DARK)
        window.unload(halt)
    return window
