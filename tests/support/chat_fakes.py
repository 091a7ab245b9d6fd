"""Chats without a model, whose answers a test writes to see how windows and terminal show them."""

import dataclasses
from collections.abc import Callable, Iterator

from onecard.config import generation
from onecard.config.chat import ONE_SEQUENCE
from onecard.config.generation import TRAINED, Generation
from onecard.data.conversation import Conversation
from onecard.data.template import Template
from onecard.errors import UserError
from onecard.inference import chat, decoding
from onecard.inference.detokenizer import PartialText
from onecard.inference.engine import Capabilities, Placement

PLAIN_TEMPLATE = Template(
    "plain", (("{text}", ""),), (("{text}", ""), ("{end}", "")), system=(("{text}", ""),)
)

EVERYTHING = Capabilities(interleaves=False)
NO_SYSTEM = dataclasses.replace(PLAIN_TEMPLATE, name="bare", system=None)


class Engine:
    """The part of an engine that a terminal uses."""

    name, context = "toy", 1000

    def __init__(self) -> None:
        self.adapters, self.placement = ["one", "two"], Placement("cpu")
        self.capabilities = Capabilities(interleaves=False, lacks={"beam": ONE_SEQUENCE})

    def check_active_adapters(self, active_adapters: generation.ActiveAdapters) -> None:
        for name, _ in active_adapters:
            if name not in self.adapters:
                raise UserError(f"No adapter is called {name}.", "Loaded: one, two.")


class Scripted:
    """A Chat that gets its answers from a function of the conversation and records the questions."""

    def __init__(
        self, write: Callable[[Conversation], Iterator[PartialText]], form: Template = PLAIN_TEMPLATE
    ):
        self.write, self.template, self.engine = write, form, Engine()
        self.active_adapters: generation.ActiveAdapters = (("one", 1.0),)
        self.versions: dict[str, str] = {}
        self.asked: list[tuple[list[str], Generation, generation.ActiveAdapters]] = []
        self.template_names: list[str] = []

    unused, modes, check_mode = chat.Chat.unused, chat.Chat.modes, chat.Chat.check_mode
    _lacking = chat.Chat._lacking

    def template_of(self, name: str = "") -> Template:
        return {"": self.template, "alpaca": dataclasses.replace(NO_SYSTEM, name="alpaca")}[name]

    def stream(self, conversation, settings, active_adapters=None, cancelled=lambda: False, template_name=""):
        self.asked.append(([turn.text for turn in conversation.turns], settings, active_adapters))
        self.template_names.append(template_name)
        self.engine.check_active_adapters(active_adapters)
        for text in self.write(conversation):
            if cancelled() and not text.finished:
                yield reply(
                    dataclasses.replace(text, stable=text.whole, open="", finished=decoding.CANCELLED)
                )
                return
            yield text if isinstance(text, chat.Reply) else reply(text)

    @property
    def questions(self) -> list[list[str]]:
        return [texts for texts, _, _ in self.asked]


def reply(text: PartialText, read: int = 7) -> chat.Reply:
    return chat.Reply(text, 7, read, 0, 0, 1.5, 0.5 if text.tokens else None, 11)


def echo(conversation: Conversation) -> Iterator[PartialText]:
    """Answer with the question in capitals, a word at a time."""
    whole = conversation.turns[-1].text.upper()
    for end in [place for place, letter in enumerate(whole) if letter == " "]:
        yield PartialText(whole[:end], tokens=end)
    yield PartialText(whole, tokens=len(whole), finished="end")


class Toy:
    """The part of a Chat that a window uses before a question."""

    def __init__(
        self,
        capabilities: Capabilities = EVERYTHING,
        active_adapters=(("one", 1.0),),
        form: Template = PLAIN_TEMPLATE,
    ):
        self.engine, self.template, self.active_adapters = Engine(), form, active_adapters
        self.engine.capabilities = capabilities
        self.versions: dict[str, str] = {}

    def template_of(self, name: str = TRAINED) -> Template:
        return dataclasses.replace(self.template, name=name or self.template.name)

    unused, modes, _lacking = chat.Chat.unused, chat.Chat.modes, chat.Chat._lacking
