"""The many-turn window: a chat with its tools, two adapters side by side on request.

A chat is kept in its browser's tab: a reload shows it again, no other tab sees it, the server keeps none.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from onecard.config.chat import ChatConfig
from onecard.config.generation import BASE, TRAINED, Generation, seeded
from onecard.errors import UserError
from onecard.inference import decoding, transcript
from onecard.inference.chat import Chat
from onecard.inference.detokenizer import Text
from onecard.inference.transcript import LEFT, RIGHT, Turns
from onecard.ui import chat_controls, forms, page
from onecard.ui import html as ui_html
from onecard.ui import sessions as ui_sessions
from onecard.ui import status as ui_status
from onecard.ui.chat_layout import ChatLayout

SUMMARISE = ("Summarize our conversation so far in three sentences.", "请用三句话概括我们到目前为止的对话。")
TOO_LONG = (
    "This chat is too long for your browser to keep: save it, a reload would lose it.",
    "对话过长，浏览器无法保留：请保存，刷新会丢失。",
)


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the inputs beside the chat say."""

    options: Generation
    form: str  # name of the prompt template
    system: str
    context: str
    mixtures: dict[str, Any]  # LEFT, and RIGHT when two are compared
    note: str = ""  # what of it cannot be had


class ChatWindow(ChatLayout):
    """What the components do."""

    def __init__(self, window: gr.Blocks, chat: Chat, options: ChatConfig):
        """window: the whole page."""
        super().__init__(chat, options)
        self.sessions = ui_sessions.Sessions()
        self.wire(window)

    def wish(self, values: tuple[Any, ...]) -> Wish:
        """The inputs' values, in the order of self.side(); raises UserError."""
        system, context, shape, choice, compare, against, *rest = values
        loaded = self.chat.engine.adapters
        weights = dict(zip(loaded, rest[len(self.inputs) :], strict=True))
        mixtures = {LEFT: chat_controls.mixture_of(choice, weights, loaded)}
        if compare:
            mixtures[RIGHT] = chat_controls.mixture_of(against, weights, loaded)
        options = forms.read(self.inputs, rest[: len(self.inputs)])
        usable, note = chat_controls.system_for(self.chat, shape, (system or "").strip(), self.lang)
        return Wish(options, shape, usable, (context or "").strip(), mixtures, note)

    def ask(self, request: gr.Request, question: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        if not question.strip():
            yield self.shown(turns, self.text("Write something first.", "请先输入内容。"), True, box=question)
            return
        yield from self.answer(request, [*turns, {"question": question}], values, turns, question, "")

    def again(self, request: gr.Request, box: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        if not turns:
            yield self.shown(turns, self.text("There is no question yet.", "还没有提问。"), True, box=box)
            return
        last = {key: turns[-1][key] for key in ("question", "input") if key in turns[-1]}
        yield from self.answer(request, [*turns[:-1], last], values, turns, box, box)

    def further(self, request: gr.Request, box: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        if not turns:
            yield self.shown(turns, self.text("There is no answer yet.", "还没有回答。"), True, box=box)
            return
        yield from self.answer(request, turns, values, turns, box, box, unfinished=True)

    def answer(
        self,
        request: gr.Request,
        turns: Turns,
        values: tuple[Any, ...],
        before: Turns,
        box: str,
        after: str,
        unfinished: bool = False,
    ) -> Iterator[list[Any]]:
        """The last turn's answer as it grows.

        before, box: what is shown when there is none; after: what stands in the box meanwhile.
        """
        try:
            wish = self.wish(values)
        except UserError as error:
            yield self.shown(before, str(error), True, box=box)
            return
        wish = dataclasses.replace(wish, options=seeded(wish.options))  # one for both sides
        last = dict(turns[-1])
        if not unfinished:
            last |= {LEFT: ""}  # a reload in the middle finds a whole turn
        if wish.context and not unfinished:
            last.setdefault("input", wish.context)
        turns = [*turns[:-1], last]
        waiting = self.text("waiting ...", "等待中 ...")
        yield self.shown(turns, waiting, texts={LEFT: Text("")}, box=after, keep=len(turns) > len(before))
        earlier = last.get("adapters", {}) if unfinished else {}  # a side that does not go on keeps its own
        turns[-1] |= transcript.made_by(self.chat, wish.options, {**earlier, **wish.mixtures}, wish.form)
        choices = {key: chat_controls.choice_of(mixture) for key, mixture in wish.mixtures.items()}
        names = {key: chat_controls.shown(choice, self.lang) for key, choice in choices.items()}
        sides: dict[str, ui_status.Said] = {}
        for key, text, told, wrong in self.grow(request, turns, wish, unfinished):
            sides[key] = text, told, wrong
            if text.whole or not unfinished:  # an answer that could not go on stays
                turns[-1][key] = text.whole
            texts = {side: grown for side, (grown, _, _) in sides.items() if grown.whole or not unfinished}
            told, wrong = ui_status.together(sides, names, wish.note)
            over = all(grown.finished or failed for grown, _, failed in sides.values())
            keep = over and any(grown.whole for grown, _, _ in sides.values())
            yield self.shown(turns, told, wrong, texts, keep=keep)
        if ui_status.came_to_nothing(sides):
            yield self.shown(before, told, wrong, box=box)
        elif not keep:
            yield self.shown(turns, told, wrong, texts)

    def grow(
        self, request: gr.Request, turns: Turns, wish: Wish, unfinished: bool
    ) -> Iterator[tuple[str, Text, str, bool]]:
        """Which side, its text, what the status line says, is it an error; two sides grow by turns."""
        growing = []
        for key, mixture in wish.mixtures.items():
            goes_on = unfinished and bool(turns[-1].get(key))
            asked = transcript.conversation(turns, wish.system, key=key, unfinished=goes_on)
            side = ui_sessions.answers(
                self.sessions,
                request.session_hash,
                self.chat,
                asked,
                wish.options,
                mixture,
                self.lang,
                wish.form,
            )
            growing.append(zip(itertools.repeat(key), side))
        if self.chat.engine.capabilities.interleaves:
            for made in itertools.chain.from_iterable(itertools.zip_longest(*growing)):
                if made is not None:
                    yield made[0], *made[1]
        else:  # the second would wait for the first
            for key, made in itertools.chain(*growing):
                yield key, *made

    def shown(
        self,
        turns: Turns,
        told: str = "",
        wrong: bool = False,
        texts: dict[str, Text] | None = None,
        box: str | None = None,
        keep: bool = True,
        other: bool = False,
    ) -> list[Any]:
        """Values of self.outputs().

        keep: in the browser too, where a reload finds it; other: the last answer is not there any more.
        """
        texts = texts or {}
        sides = [self.messages(turns, key, texts.get(key)) for key in (LEFT, RIGHT)]
        beams = ui_html.beams(texts[LEFT]) if LEFT in texts else "" if other else gr.skip()
        kept = json.dumps(turns, ensure_ascii=False) if keep else gr.skip()
        return [turns, kept, *sides, ui_status.status(told, wrong), gr.skip() if box is None else box, beams]

    def outputs(self) -> list[gr.Component]:
        return [self.state, self.kept, self.left, self.right, self.status, self.box, self.beams]

    def messages(self, turns: Turns, key: str, text: Text | None) -> list[dict[str, str]]:
        made = []
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            asked = turn["question"] + (f"\n\n{turn['input']}" if turn.get("input") else "")
            made.append({"role": "user", "content": ui_html.as_markdown(Text(asked))})
            earlier = str(turn.get(key) or ("" if last else turn.get(LEFT, "")))
            answer = text if last and text is not None else Text(earlier)
            if answer.whole:
                made.append({"role": "assistant", "content": ui_html.as_markdown(answer)})
        return made

    def summed_up(self, request: gr.Request, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        """Summary -> context; the turns go when it is whole.

        The context's text stays before it, unless a turn was asked with that: then the summary has it.
        """
        if not turns:
            yield [
                *self.shown(turns, self.text("Nothing to summarise yet.", "还没有内容。"), True),
                gr.skip(),
            ]
            return
        try:
            wish = self.wish(values)
        except UserError as error:
            yield [*self.shown(turns, str(error), True), gr.skip()]
            return
        wish = dataclasses.replace(wish, mixtures={LEFT: wish.mixtures[LEFT]})
        asked = [*turns, {"question": self.text(*SUMMARISE)}]
        text, failed = Text(""), False
        for _, grown, told, failed in self.grow(request, asked, wish, unfinished=False):
            text = grown
            yield [*self.shown(turns, told, failed, keep=False), gr.skip()]
        if text.finished in (decoding.END, decoding.STOP) and text.whole:
            done = "Summarised: the context stands for the earlier turns.", "已总结：以背景代替之前的对话。"
            new = wish.context if all(wish.context != turn.get("input") for turn in turns) else ""
            yield [
                *self.shown([], self.text(*done), other=True),
                "\n\n".join(filter(None, [new, text.whole])),
            ]
        elif not failed:
            kept = "The summary is not whole, so the chat stays as it was", "总结不完整，对话保持不变"
            why = ui_status.WHY[text.finished] if text.whole else ("it is empty", "内容为空")
            if text.finished == decoding.LENGTH:
                limit = self.inputs["max_new_tokens"].label
                why = f"{why[0]}; raise {limit}", f"{why[1]}；请增大{limit}"
            told = f"{self.text(*kept)}: {self.text(*why)}."
            yield [*self.shown(turns, told, True), gr.skip()]

    def fresh(self) -> list[Any]:
        """A new session: no turns, and everything beside them as the program was started."""
        given = dict(self.chat.mixture)
        start = [getattr(self.options, name) for name in self.inputs]
        weights = [given.get(name, 1.0) for name in self.chat.engine.adapters]
        pickers = [TRAINED, chat_controls.choice_of(self.chat.mixture), False, BASE]
        return [*self.shown([], box="", other=True), self.options.system, "", *pickers, *start, *weights]

    def side_by_side(self, choice: str, on: bool, against: str) -> list[Any]:
        """Two chats with their adapters' names, or one without; and which weights have an effect."""
        left = gr.update(show_label=on, label=chat_controls.shown(choice, self.lang))
        weights = chat_controls.weighing(self.chat, [choice, against] if on else [choice], self.lang).values()
        right = gr.update(visible=on, label=chat_controls.shown(against, self.lang))
        return [left, right, gr.update(visible=on), *(gr.update(**can) for can in weights)]

    def take_back(self, box: str, context: str, turns: Turns) -> list[Any]:
        """The last question and its context into their boxes, unless something else was typed there."""
        asked, wrong = turns[-1].get("input", "") if turns else "", None
        if not turns:
            wrong = "There is no question yet.", "还没有提问。"
        elif asked and context.strip() not in ("", asked):
            wrong = "The context is another now: save or remove it first.", "背景已更改，请先保存或删除。"
        elif box.strip():
            wrong = "Your message is not sent yet: send or remove it first.", "内容尚未发送，请先发送或删除。"
        if wrong:
            return [*self.shown(turns, self.text(*wrong), True), gr.skip()]
        return [*self.shown(turns[:-1], box=turns[-1]["question"], other=True), asked or gr.skip()]

    def saved(self, turns: Turns, *values: Any) -> tuple[str, str]:
        try:
            wish = self.wish(values)
            if not turns:
                raise UserError(self.text("There is nothing to save yet.", "还没有可保存的内容。"))
        except UserError as error:
            return "", ui_status.status(str(error), True)
        told = self.text("Saved by your browser.", "已由浏览器保存。")
        how = (wish.options, self.chat, self.options, wish.mixtures, wish.form)
        return transcript.record(turns, *how, system=wish.system, context=wish.context), ui_status.status(
            told
        )

    def loaded(self, path: str, *weights: float) -> list[Any]:
        """A saved chat: its turns, texts, options, template and adapters, as far as they can be had here."""
        file = Path(path)
        try:
            saved, notes = transcript.fitted(transcript.load(file), self.chat)
        except (UserError, OSError) as error:
            nothing = [gr.skip()] * (len(self.outputs()) + len(self.side()))
            nothing[self.outputs().index(self.status)] = ui_status.status(str(error), True)
            return nothing
        finally:
            file.unlink(missing_ok=True)  # the server keeps no chat
        values, beyond = forms.clamped(saved.options, list(self.inputs), self.options)
        choices, sliders, more = chat_controls.restored(self.chat, saved.mixtures, list(weights))
        notes = [*notes, *beyond, *more]
        pickers = [gr.skip() if saved.template is None else saved.template, choices.get(LEFT, gr.skip())]
        pickers += [RIGHT in choices, choices.get(RIGHT, gr.skip())] if choices else [gr.skip()] * 2
        told = self.text("Loaded.", "已载入。")
        if notes:
            lacking = "; ".join(self.text(*note).rstrip(".") for note in notes)
            told = self.text(f"Loaded, but not as saved: {lacking}.", f"已载入，但与保存时不同：{lacking}。")
        texts = [saved.texts["system"], saved.texts["context"]]
        return [*self.shown(saved.turns, told, bool(notes), other=True), *texts, *pickers, *values, *sliders]

    def reopened(self, kept: str) -> list[Any]:
        """What this tab had kept, if it did."""
        try:
            turns = transcript.turns_of(json.loads(kept or "[]"))
        except (UserError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            turns = []
        return self.shown(turns)

    def wire(self, window: gr.Blocks) -> None:
        given = [self.box, self.state, *self.side()]

        def long(
            triggers: list[Any], work: Any, inputs: list[Any], outputs: list[Any], *more: gr.Component
        ) -> None:
            parts = [self.send, self.stop, [*self.others(), *more], self.status, self.lang, page.FOCUS]
            chat_controls.answering(triggers, work, inputs, outputs, self.sessions, *parts)

        long([self.send.click, self.box.submit], self.ask, given, self.outputs())
        long([self.retry.click], self.again, given, self.outputs())
        long([self.go_on.click], self.further, given, self.outputs())
        summed = [self.state, *self.side()]
        written = [*self.outputs(), self.context]
        long([self.summarise.click], self.summed_up, summed, written, self.context)
        chat_controls.halting(self.stop, window, self.sessions, self.status, self.lang)
        typed = [self.box, self.context, self.state]
        self.edit.click(self.take_back, typed, [*self.outputs(), self.context], **page.QUICK)
        self.delete.click(
            lambda turns: self.shown(turns[:-1], other=True), self.state, self.outputs(), **page.QUICK
        )
        for trigger in (self.clear.click, self.left.clear, self.right.clear):
            trigger(lambda: self.shown([], other=True), None, self.outputs(), **page.QUICK)
        fresh = [*self.outputs(), *self.side()]
        self.new.click(self.fresh, None, fresh, **page.QUICK)
        compared = [self.adapter, self.compare, self.against]
        gr.on(
            [box.change for box in compared],
            self.side_by_side,
            compared,
            [self.left, self.right, self.against, *self.weights],
            **page.QUICK,
        )
        saving = self.save.click(
            self.saved, [self.state, *self.side()], [self.line, self.status], **page.QUICK
        )
        saving.then(None, self.line, None, js=page.DOWNLOAD)
        self.load.upload(self.loaded, [self.load, *self.weights], fresh, **page.QUICK)
        self.form.change(
            lambda name: gr.update(**self.usable_system(name)), self.form, self.system, **page.QUICK
        )
        chat_controls.wire(window, self.chat, self.options, self.inputs, self.reset)
        unkept = ui_status.status(self.text(*TOO_LONG), True)
        self.kept.change(None, self.kept, self.unkept, js=page.KEEP_CHAT % json.dumps(unkept))
        texts = [self.context, self.system]
        for text in texts:
            text.change(None, texts, None, js=page.KEEP_TEXTS)
        # in the browser alone: what is typed while the page opens must not wait for the server
        window.load(None, texts, texts, js=page.KEPT_TEXTS)
        window.load(self.reopened, self.kept, self.outputs(), js=page.KEPT_CHAT, **page.QUICK)


def turns(chat: Chat, options: ChatConfig, training: Callable[[str], None] | None = None) -> gr.Blocks:
    """The page of interaction.py; training: makes the training window, in a tab of its own."""
    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        if training is None:
            ChatWindow(window, chat, options)
        else:
            with gr.Tab(forms.text(options.lang, "Chat", "对话")):
                ChatWindow(window, chat, options)
            with gr.Tab(forms.text(options.lang, "Training", "训练"), elem_id="training"):
                training(options.lang)
    return window
