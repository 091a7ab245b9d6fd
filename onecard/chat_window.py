"""The many-turn window: a chat with its tools, two adapters side by side on request.

A chat is kept in its browser: a reload shows it again, no other browser sees it, the server keeps none.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from onecard import controls, decoding, form, page, talking, transcript
from onecard.answer import Text
from onecard.chat_config import ChatConfig, Generation
from onecard.chat_layout import ChatLayout
from onecard.errors import UserError

SUMMARISE = ("Summarize our conversation so far in three sentences.", "请用三句话概括我们到目前为止的对话。")
FOCUS = "() => document.querySelector('#box textarea')?.focus()"
DOWNLOAD = """(line) => {
  if (!line) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([line], {type: 'application/jsonl'}));
  link.download = 'chat-' + new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-') + '.jsonl';
  link.click();
}"""
Turns = list[dict[str, Any]]  # question, input, answer, other (of the second adapter), what made them
LEFT, RIGHT = "answer", "other"


@dataclasses.dataclass(frozen=True)
class Wish:
    """What the inputs beside the chat say."""

    options: Generation
    system: str
    context: str
    mixtures: dict[str, Any]  # LEFT, and RIGHT when two are compared


class ChatWindow(ChatLayout):
    """What the components do."""

    def __init__(self, window: gr.Blocks, chat: Any, options: ChatConfig):
        """window: the whole page; chat: a chat.Chat."""
        super().__init__(chat, options)
        self.sessions = talking.Sessions()
        self.wire(window)

    def wish(self, values: tuple[Any, ...]) -> Wish:
        """The inputs' values, in the order of self.side(); raises UserError."""
        system, context, choice, compare, against, *rest = values
        names = list(self.inputs)
        loaded = self.chat.engine.adapters
        weights = dict(zip(loaded, rest[len(names) :], strict=True))
        mixtures = {LEFT: talking.mixture_of(choice, weights, loaded)}
        if compare:
            mixtures[RIGHT] = talking.mixture_of(against, weights, loaded)
        options = form.read(dict(zip(names, rest[: len(names)], strict=True)))
        return Wish(options, (system or "").strip(), (context or "").strip(), mixtures)

    def ask(self, request: gr.Request, question: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        if not question.strip():
            yield self.shown(turns, self.say("Write something first.", "请先输入内容。"), True, box=question)
            return
        yield from self.answer(request, [*turns, {"question": question}], values, turns, question, "")

    def again(self, request: gr.Request, box: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        if not turns:
            yield self.shown(turns, self.say("There is no question yet.", "还没有提问。"), True, box=box)
            return
        last = {key: turns[-1][key] for key in ("question", "input") if key in turns[-1]}
        yield from self.answer(request, [*turns[:-1], last], values, turns, box, box)

    def further(self, request: gr.Request, box: str, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        if not turns:
            yield self.shown(turns, self.say("There is no answer yet.", "还没有回答。"), True, box=box)
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

        before, box: what is shown when it cannot even begin; after: what stands in the box meanwhile.
        """
        try:
            wish = self.wish(values)
        except UserError as error:
            yield self.shown(before, str(error), True, box=box)
            return
        last = dict(turns[-1])
        if not unfinished:
            last |= {LEFT: ""}  # a reload in the middle finds a whole turn
        if wish.context and not unfinished:
            last.setdefault("input", wish.context)
        turns = [*turns[:-1], last]
        waiting = self.say("waiting ...", "等待中 ...")
        yield self.shown(turns, waiting, texts={LEFT: Text("")}, box=after, keep=len(turns) > len(before))
        texts: dict[str, Text] = {}
        for key, text, told, wrong in self.grow(request, turns, wish, unfinished):
            texts[key] = text
            if wrong and not text.whole and not texts.get(LEFT, text).whole:
                yield self.shown(before, told, True, box=box)
                return
            turns[-1] |= {key: text.whole, **self.made_by(wish)}
            ended = all(grown.finished for grown in texts.values())
            yield self.shown(turns, told, wrong, texts, keep=ended or wrong)

    def grow(
        self, request: gr.Request, turns: Turns, wish: Wish, unfinished: bool
    ) -> Iterator[tuple[str, Text, str, bool]]:
        """Which side, its text, what the status line says, is it an error; two sides grow by turns."""
        growing = []
        for key, mixture in wish.mixtures.items():
            goes_on = unfinished and bool(turns[-1].get(key))
            asked = talking.conversation(turns, wish.system, key=key, unfinished=goes_on)
            side = talking.answers(
                self.sessions, request.session_hash, self.chat, asked, wish.options, mixture, self.lang
            )
            growing.append(zip(itertools.repeat(key), side))
        if self.chat.engine.name == "transformers":
            for made in itertools.chain.from_iterable(itertools.zip_longest(*growing)):
                if made is not None:
                    yield made[0], *made[1]
        else:  # one sequence at a time
            for key, made in itertools.chain(*growing):
                yield key, *made

    def made_by(self, wish: Wish) -> dict[str, Any]:
        options = dataclasses.asdict(wish.options)
        return {"options": options, "adapters": {key: dict(mix) for key, mix in wish.mixtures.items()}}

    def shown(
        self,
        turns: Turns,
        told: str = "",
        wrong: bool = False,
        texts: dict[str, Text] | None = None,
        box: str | None = None,
        keep: bool = True,
    ) -> list[Any]:
        """Values of self.outputs(). keep: in the browser too, where a reload finds it."""
        texts = texts or {}
        sides = [self.messages(turns, key, texts.get(key)) for key in (LEFT, RIGHT)]
        beams = page.beams(texts[LEFT], self.lang) if LEFT in texts else gr.skip()
        kept = turns if keep else gr.skip()
        return [turns, kept, *sides, page.status(told, wrong), gr.skip() if box is None else box, beams]

    def outputs(self) -> list[gr.Component]:
        return [self.state, self.kept, self.left, self.right, self.status, self.box, self.beams]

    def messages(self, turns: Turns, key: str, text: Text | None) -> list[dict[str, str]]:
        made = []
        for number, turn in enumerate(turns):
            last = number == len(turns) - 1
            asked = turn["question"] + (f"\n\n{turn['input']}" if turn.get("input") else "")
            made.append({"role": "user", "content": page.as_markdown(Text(asked))})
            earlier = str(turn.get(key) or ("" if last else turn.get(LEFT, "")))
            answer = text if last and text is not None else Text(earlier)
            if answer.whole:
                made.append({"role": "assistant", "content": page.as_markdown(answer)})
        return made

    def summed_up(self, request: gr.Request, turns: Turns, *values: Any) -> Iterator[list[Any]]:
        """Summary -> context; the turns go when it is whole."""
        if not turns:
            yield [*self.shown(turns, self.say("Nothing to summarise yet.", "还没有内容。"), True), gr.skip()]
            return
        try:
            wish = self.wish(values)
        except UserError as error:
            yield [*self.shown(turns, str(error), True), gr.skip()]
            return
        wish = dataclasses.replace(wish, mixtures={LEFT: wish.mixtures[LEFT]})
        asked = [*turns, {"question": self.say(*SUMMARISE)}]
        text, failed = Text(""), False
        for _, grown, told, failed in self.grow(request, asked, wish, unfinished=False):
            text = grown
            yield [*self.shown(turns, told, failed, keep=False), gr.skip()]
        if text.finished in (decoding.END, decoding.STOP) and text.whole:
            done = "Summarised: the context stands for the earlier turns.", "已总结：以背景代替之前的对话。"
            yield [*self.shown([], self.say(*done)), text.whole]
        elif not failed:
            kept = "The summary is not whole, so the chat stays as it was.", "总结不完整，对话保持不变。"
            yield [*self.shown(turns, self.say(*kept), True), gr.skip()]

    def fresh(self) -> list[Any]:
        """A new session: no turns, and everything as the program was started."""
        start = [getattr(self.options, name) for name in self.inputs]
        return [*self.shown([], box=""), self.options.system, "", *start]

    def side_by_side(self, choice: str, on: bool, against: str) -> list[Any]:
        """Two chats with their adapters' names, or one without."""
        left = gr.update(show_label=on, label=choice)
        return [left, gr.update(visible=on, label=against), gr.update(visible=on)]

    def take_back(self, turns: Turns) -> list[Any]:
        question = turns[-1]["question"] if turns else None
        return self.shown(turns[:-1], box=question)

    def saved(self, turns: Turns, *values: Any) -> tuple[str, str]:
        try:
            wish = self.wish(values)
            if not turns:
                raise UserError(self.say("There is nothing to save yet.", "还没有可保存的内容。"))
        except UserError as error:
            return "", page.status(str(error), True)
        about = {
            "model": self.options.model_path,
            "lora_path": self.options.lora_path,
            "engine": self.chat.engine.name,
            "template": self.chat.template.name,
            "system": wish.system,
            "context": wish.context,
            "adapters": {key: dict(mix) for key, mix in wish.mixtures.items()},
        }
        told = self.say("Saved by your browser.", "已由浏览器保存。")
        return transcript.record(turns, wish.options, **about), page.status(told)

    def loaded(self, path: str) -> list[Any]:
        """A saved chat: its turns, texts and options."""
        file = Path(path)
        sides = [self.system, self.context, *self.inputs.values()]
        try:
            turns, options, about = transcript.read(file.read_text(encoding="utf-8"))
        except (UserError, ValueError, OSError) as error:
            nothing = [gr.skip()] * (len(self.outputs()) + len(sides))
            nothing[self.outputs().index(self.status)] = page.status(str(error), True)
            return nothing
        finally:
            file.unlink(missing_ok=True)  # the server keeps no chat
        values = [getattr(options, name) for name in self.inputs]
        said = [str(about.get(name) or "") for name in ("system", "context")]
        return [*self.shown(turns, self.say("Loaded.", "已载入。")), *said, *values]

    def wire(self, window: gr.Blocks) -> None:
        given = [self.box, self.state, *self.side()]

        def halt(request: gr.Request) -> None:
            self.sessions.stop(request.session_hash)

        def swap(answering: bool) -> list[Any]:
            send, stop = gr.update(visible=not answering), gr.update(visible=answering)
            return [send, stop, *(gr.update(interactive=not answering) for _ in self.others())]

        def begin(request: gr.Request) -> list[Any]:
            self.sessions.begin(request.session_hash)
            return swap(True)

        def end(request: gr.Request) -> list[Any]:
            self.sessions.end(request.session_hash)
            return swap(False)

        def long(triggers: list[Any], work: Any, inputs: list[Any], outputs: list[Any]) -> None:
            """Work that shows Stop instead of Send."""
            buttons = [self.send, self.stop, *self.others()]
            begun = gr.on(triggers, begin, None, buttons, **page.QUICK)
            done = begun.then(work, inputs, outputs, **page.LONG)
            done.then(end, None, buttons, **page.QUICK).then(None, js=FOCUS)
            done.failure(end, None, buttons, **page.QUICK)  # then() is not for those

        long([self.send.click, self.box.submit], self.ask, given, self.outputs())
        long([self.retry.click], self.again, given, self.outputs())
        long([self.go_on.click], self.further, given, self.outputs())
        summed = [self.state, *self.side()]
        long([self.summarise.click], self.summed_up, summed, [*self.outputs(), self.context])
        self.stop.click(halt, **page.QUICK)
        self.edit.click(self.take_back, self.state, self.outputs(), **page.QUICK)
        self.delete.click(lambda turns: self.shown(turns[:-1]), self.state, self.outputs(), **page.QUICK)
        for trigger in (self.clear.click, self.left.clear, self.right.clear):
            trigger(lambda: self.shown([]), None, self.outputs(), **page.QUICK)
        texts = [self.system, self.context]
        fresh = [*self.outputs(), *texts, *self.inputs.values()]
        self.new.click(self.fresh, None, fresh, **page.QUICK)
        compared = [self.adapter, self.compare, self.against]
        gr.on(
            [box.change for box in compared],
            self.side_by_side,
            compared,
            [self.left, self.right, self.against],
            **page.QUICK,
        )
        saving = self.save.click(
            self.saved, [self.state, *self.side()], [self.line, self.status], **page.QUICK
        )
        saving.then(None, self.line, None, js=DOWNLOAD)
        self.load.upload(self.loaded, self.load, fresh, **page.QUICK)
        self.dark.click(None, js=page.TOGGLE_DARK)
        controls.wire(window, self.chat, self.options, self.inputs, self.reset)
        window.load(lambda turns: self.shown(turns or []), self.kept, self.outputs(), **page.QUICK)
        window.unload(halt)


def turns(chat: Any, options: ChatConfig, training: Callable[[str], None] | None = None) -> gr.Blocks:
    """The page of interaction.py; training: makes the training window, in a tab of its own."""
    with gr.Blocks(analytics_enabled=False, title="OneCard", fill_width=True) as window:
        if training is None:
            ChatWindow(window, chat, options)
        else:
            with gr.Tab(form.say(options.lang, "Chat", "对话")):
                ChatWindow(window, chat, options)
            with gr.Tab(form.say(options.lang, "Training", "训练"), elem_id="training"):
                training(options.lang)
    return window
