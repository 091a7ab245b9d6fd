"""What the buttons do that ask the model: Send, Retry, Continue and Summarise.

Each is a generator: what it yields are values of ChatView.outputs(), shown while the answer grows.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import gradio as gr

from onecard.config.generation import seeded
from onecard.errors import UserError
from onecard.inference import decoding, transcript
from onecard.inference.detokenizer import PartialText
from onecard.inference.transcript import LEFT, Turns
from onecard.ui import adapter_picker, chat_inputs
from onecard.ui import sessions as ui_sessions
from onecard.ui import status as ui_status
from onecard.ui.chat_inputs import ChatInputs
from onecard.ui.chat_layout import ChatLayout
from onecard.ui.chat_view import ChatView
from onecard.ui.status import AnswerUpdate

SUMMARISE = ("Summarize our conversation so far in three sentences.", "请用三句话概括我们到目前为止的对话。")


class ChatAnswers:
    """The answers of one window; values: those of layout.side()."""

    def __init__(self, layout: ChatLayout, view: ChatView, sessions: ui_sessions.Sessions):
        self.layout, self.view, self.sessions = layout, view, sessions
        self.chat, self.text = layout.chat, layout.text

    def ask(self, request: gr.Request, question: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        """Answer a new question."""
        if not question.strip():
            yield self.view.refusal(turns, "Write a message first.", "请先输入内容。", question)
            return
        yield from self._answer(request, [*turns, {"question": question}], values, turns, question, "")

    def retry(self, request: gr.Request, box: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        """Answer the last question again."""
        if not turns:
            yield self.view.refusal(turns, "There is no question yet.", "还没有提问。", box)
            return
        question = {key: turns[-1][key] for key in ("question", "input") if key in turns[-1]}
        yield from self._answer(request, [*turns[:-1], question], values, turns, box, box)

    def go_on(self, request: gr.Request, box: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        """Continue the last answer where it ended."""
        if not turns:
            yield self.view.refusal(turns, "There is no answer yet.", "还没有回答。", box)
            return
        yield from self._answer(request, turns, values, turns, box, box, goes_on=True)

    def _answer(
        self,
        request: gr.Request,
        turns: Turns,
        values: tuple[Any, ...],
        before: Turns,
        box: str,
        box_meanwhile: str,
        goes_on: bool = False,
    ) -> Iterator[list[Any]]:
        """Answer the last turn and show the answer as it grows.

        before, box: the turns and the message box when no answer comes; box_meanwhile: the message box while
        the answer grows; goes_on: the answer continues the one that is there.
        """
        try:
            inputs = chat_inputs.read(self.layout, values)
        except UserError as error:
            yield self.view.update(before, str(error), True, box=box)
            return
        inputs = dataclasses.replace(inputs, options=seeded(inputs.options))  # both sides draw with one seed
        turn = dict(turns[-1])
        if not goes_on:
            turn |= {LEFT: ""}  # a reload while the answer grows finds a whole turn
            if inputs.context:
                turn.setdefault("input", inputs.context)
        turns = [*turns[:-1], turn]
        waiting, is_new = self.text("waiting ...", "等待中 ..."), len(turns) > len(before)
        yield self.view.update(turns, waiting, texts={LEFT: PartialText("")}, box=box_meanwhile, store=is_new)
        earlier = turn.get("adapters", {}) if goes_on else {}  # a side that does not go on keeps its own
        adapters = {**earlier, **inputs.adapters}
        turn |= transcript.made_by(self.chat, inputs.options, adapters, inputs.template_name)
        updates: dict[str, AnswerUpdate] = {}
        for side, update in self._grow(request, turns, inputs, goes_on):
            updates[side] = update
            if update.text.whole or not goes_on:  # an answer that could not be continued stays
                turn[side] = update.text.whole
            texts = {key: one.text for key, one in updates.items() if one.text.whole or not goes_on}
            message, is_error = ui_status.combined(updates, self._names(inputs), inputs.note)
            is_over = all(one.text.finished or one.is_error for one in updates.values())
            store = is_over and any(one.text.whole for one in updates.values())
            yield self.view.update(turns, message, is_error, texts, store=store)
        if ui_status.is_nothing(updates):
            yield self.view.update(before, message, is_error, box=box)
        elif not store:
            yield self.view.update(turns, message, is_error, texts)

    def _names(self, inputs: ChatInputs) -> dict[str, str]:
        """What the status line calls the sides: the choice of their adapters."""
        choices = {side: adapter_picker.choice_of(adapters) for side, adapters in inputs.adapters.items()}
        return {side: adapter_picker.shown(choice, self.layout.lang) for side, choice in choices.items()}

    def _grow(
        self, request: gr.Request, turns: Turns, inputs: ChatInputs, goes_on: bool
    ) -> Iterator[tuple[str, AnswerUpdate]]:
        """The updates of each side; two sides grow by turns where the engine can interleave them."""
        streams = []
        for side, adapters in inputs.adapters.items():
            unfinished = goes_on and bool(turns[-1].get(side))
            conversation = transcript.conversation(turns, inputs.system, key=side, unfinished=unfinished)
            updates = ui_sessions.answers(
                self.sessions,
                request.session_hash,
                self.chat,
                conversation,
                inputs.options,
                adapters,
                self.layout.lang,
                inputs.template_name,
            )
            streams.append(zip(itertools.repeat(side), updates))
        if self.chat.engine.capabilities.interleaves:
            by_turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
            yield from (update for update in by_turns if update is not None)
        else:  # the engine would make the second side wait until the first is whole
            yield from itertools.chain(*streams)

    def summarise(self, request: gr.Request, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        """Put a summary of the turns into the context, and remove the turns once it is whole.

        It yields one value more than the others, that of the context box. What stood there stays before the
        summary, unless a turn was asked with it: then it is part of the summary.
        """
        if not turns:
            yield [*self.view.refusal(turns, "There is nothing to summarise yet.", "还没有内容。"), gr.skip()]
            return
        try:
            inputs = chat_inputs.read(self.layout, values)
        except UserError as error:
            yield [*self.view.update(turns, str(error), True), gr.skip()]
            return
        inputs = dataclasses.replace(inputs, adapters={LEFT: inputs.adapters[LEFT]})
        request_turn = {"question": self.text(*SUMMARISE)}
        update = AnswerUpdate(PartialText(""), "", False)
        for _, update in self._grow(request, [*turns, request_turn], inputs, False):
            shown = self.view.update(turns, update.message, update.is_error, store=False)
            yield [*shown, gr.skip()]
        text = update.text
        if text.finished in (decoding.END, decoding.STOP) and text.whole:
            is_new = all(inputs.context != turn.get("input") for turn in turns)
            context = "\n\n".join(filter(None, [inputs.context if is_new else "", text.whole]))
            done = self.text(
                "Summarised. The context now stands for the earlier turns.",
                "已总结：背景现在代替之前的对话。",
            )
            yield [*self.view.update([], done, clear_beams=True), context]
        elif not update.is_error:
            yield [*self.view.update(turns, self._why_not_summarised(text), True), gr.skip()]

    def _why_not_summarised(self, text: PartialText) -> str:
        reason = ui_status.WHY[text.finished] if text.whole else ("it is empty", "内容为空")
        if text.finished == decoding.LENGTH:
            label = self.layout.inputs["max_new_tokens"].label
            reason = f"{reason[0]}; raise {label}", f"{reason[1]}；请增大{label}"
        return self.text(
            f"The summary is incomplete, so the chat stays as it was: {reason[0]}.",
            f"总结不完整，对话保持不变：{reason[1]}。",
        )
