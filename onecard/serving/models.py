"""The names that callers use for models, and what answers under each: a chat, active adapters, a template.

`base` is the base model alone, the name of an adapter is the base with that adapter, and `a+0.5*b` is a
mixture. Nothing here reads weights: a program hands the chat in.
"""

import re
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from onecard.config.generation import BASE, TRAINED, ActiveAdapters
from onecard.errors import UserError
from onecard.inference.chat import Chat
from onecard.serving.refusals import NOT_FOUND, RequestError

WEIGHT = re.compile(r"\d{1,3}(\.\d{1,6})?")
MOST_MIXED = 8  # adapters of one mixture


class Served(NamedTuple):
    """What answers under one name."""

    name: str
    chat: Chat
    active_adapters: ActiveAdapters
    template_name: str  # as Chat.template_of takes it


class Listed(NamedTuple):
    """A model of the list that callers get."""

    name: str
    created: int  # seconds since 1970


class Models:
    """The models of one chat. Adapters may come and go while requests are answered."""

    def __init__(self, chat: Chat, templates: Mapping[str, str] | None = None):
        """templates: name of an adapter -> the template it was trained with, where that is not the chat's."""
        self.chat = chat
        self.created = {name: int(time.time()) for name in (BASE, *chat.engine.adapters)}
        self.templates = dict(templates or {})
        self.lock = threading.Lock()

    @property
    def is_ready(self) -> bool:
        return self.chat.engine.is_loaded

    def listed(self) -> list[Listed]:
        """`base` and each adapter; mixtures are not listed."""
        with self.lock:
            now = int(time.time())
            return [
                Listed(name, self.created.setdefault(name, now))
                for name in (BASE, *self.chat.engine.adapters)
            ]

    def find(self, name: str) -> Served:
        """What answers under this name; raises RequestError 404."""
        if name == BASE:
            return Served(name, self.chat, (), TRAINED)
        active = self._parsed(name)
        try:
            self.chat.engine.check_active_adapters(active)
        except UserError as error:
            raise self._missing(name, error.problem) from None
        return Served(name, self.chat, active, self.templates.get(active[0][0], TRAINED))

    def _parsed(self, name: str) -> ActiveAdapters:
        loaded = self.chat.engine.adapters
        if name in loaded:  # such a name may hold a + or *
            return ((name, 1.0),)
        parts = name.split("+")
        if len(parts) > MOST_MIXED:
            raise self._missing(name, f"A mixture has at most {MOST_MIXED} adapters.")
        weights: dict[str, float] = {}
        for part in parts:
            weight, star, adapter = part.rpartition("*")
            if adapter not in loaded or adapter in weights or (star and not WEIGHT.fullmatch(weight)):
                raise self._missing(name)
            weights[adapter] = float(weight) if star else 1.0
        return tuple(weights.items())

    def _missing(self, name: str, why: str = "") -> RequestError:
        names = ", ".join(each.name for each in self.listed())
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        message = f"There is no model {shown!r}. {why}".strip()
        return RequestError(NOT_FOUND, f"{message} There are: {names}.", "model", "model_not_found")
