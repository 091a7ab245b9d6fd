"""A chat as the values of the components that show it. It asks no model and keeps nothing."""

import json
from typing import Any

import gradio as gr

from onecard.inference.detokenizer import PartialText
from onecard.inference.transcript import LEFT, RIGHT, Turns
from onecard.ui import html as ui_html
from onecard.ui.chat_layout import ChatLayout


class ChatView:
    """What an event handler returns to show a chat."""

    def __init__(self, layout: ChatLayout):
        self.layout = layout

    def outputs(self) -> list[gr.Component]:
        """The components that `update` has values for."""
        shown = self.layout
        return [shown.state, shown.stored, shown.left, shown.right, shown.status, shown.box, shown.beams]

    def update(
        self,
        turns: Turns,
        message: str = "",
        is_error: bool = False,
        texts: dict[str, PartialText] | None = None,
        box: str | None = None,
        store: bool = True,
        clear_beams: bool = False,
    ) -> list[Any]:
        """Values of self.outputs().

        texts: the last turn's answers while they grow, by side. box: new text of the message box; None leaves
        it. store: also keep the turns in the browser, where a reload finds them. clear_beams: the answer
        whose beams are shown is gone.
        """
        texts = texts or {}
        sides = [self._messages(turns, side, texts.get(side)) for side in (LEFT, RIGHT)]
        beams = ui_html.beams(texts[LEFT]) if LEFT in texts else "" if clear_beams else gr.skip()
        stored = json.dumps(turns, ensure_ascii=False) if store else gr.skip()
        status = ui_html.status_line(message, is_error)
        return [turns, stored, *sides, status, gr.skip() if box is None else box, beams]

    def refusal(self, turns: Turns, english: str, chinese: str, box: str | None = None) -> list[Any]:
        """Values of self.outputs() that show why nothing was done."""
        return self.update(turns, self.layout.text(english, chinese), True, box=box)

    def _messages(self, turns: Turns, side: str, text: PartialText | None) -> list[dict[str, str]]:
        """The messages of one side for gr.Chatbot; text: the last answer while it grows."""
        messages = []
        for number, turn in enumerate(turns):
            is_last = number == len(turns) - 1
            question = turn["question"] + (f"\n\n{turn['input']}" if turn.get("input") else "")
            messages.append({"role": "user", "content": ui_html.as_markdown(PartialText(question))})
            finished = str(turn.get(side) or ("" if is_last else turn.get(LEFT, "")))
            answer = text if is_last and text is not None else PartialText(finished)
            if answer.whole:
                messages.append({"role": "assistant", "content": ui_html.as_markdown(answer)})
        return messages
