"""An engine whose model is loaded when a first question comes: until then the memory is somebody else's.

On one card a model that only waits for questions would compete with a training.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

from onecard.config.generation import Mixture
from onecard.errors import MEMORY, UserError, is_out_of_memory
from onecard.inference.loader import Found
from onecard.system import hardware

LOOK_AGAIN = 2.0  # seconds between two looks who else is at work


class Engine:
    """Knows its name, adapters and tokenizer; everything else loads the model."""

    def __init__(self, found: Found, load: Callable[[], Any], beside: Callable[[str], list[str]]):
        """load: makes the engine; beside: device -> names of the runs that are trained on it now."""
        self.name, self.cannot = found.kind.name, found.kind.cannot
        self.adapters, self.tokenizer = [source.name for source in found.adapters], found.tokenizer
        self.device, self._load, self._beside = found.device.value, load, beside
        self.lock = threading.Lock()
        self.engine: Any = None
        self.seen: tuple[float, list[str]] = (float("-inf"), [])

    @property
    def is_loaded(self) -> bool:
        return self.engine is not None

    def loaded(self) -> Any:
        """The engine; who asks second waits for the first. Raises UserError; a next question tries again."""
        with self.lock:
            if self.engine is None:
                try:
                    self.engine = self._load()
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    error.__traceback__ = None  # its frames hold what was read so far
                    hardware.forget_cached_memory("cuda" if self.device == "all" else self.device)
                    others = ", ".join(self.beside())
                    problem = "Out of memory while the model was loaded."
                    fix = f"Wait for {others}, or stop it." if others else "Start with fewer --bits."
                    raise UserError(problem, fix, MEMORY) from None
            return self.engine

    def beside(self) -> list[str]:
        """Names of the runs that are trained on the same card or processor now."""
        when, names = self.seen
        if time.monotonic() - when > LOOK_AGAIN:
            names = self._beside(self.device)
            self.seen = time.monotonic(), names
        return names

    @property
    def context(self) -> int:
        return self.loaded().context

    def describe(self) -> tuple[str, str]:
        """Where it runs and beside whom, English and Chinese."""
        english, chinese = self.loaded().describe()
        for name in self.beside():
            english, chinese = f"{english}, beside the training {name}", f"{chinese}，与训练 {name} 同时运行"
        return english, chinese

    def check_mixture(self, mixture: Mixture) -> None:
        """Raise UserError when these adapters cannot be used so; of a model that waits, the names alone."""
        if self.is_loaded:
            self.loaded().check_mixture(mixture)
        unknown = [name for name, _ in mixture if name not in self.adapters]
        if unknown:
            known = ", ".join(self.adapters) or "none"
            raise UserError(f"No adapter is called {unknown[0]}.", f"Loaded: {known}.")

    def open(self, prompt: list[int], mixture: Mixture = ()) -> Any:
        return self.loaded().open(prompt, mixture)

    def forget(self) -> None:
        self.loaded().forget()
