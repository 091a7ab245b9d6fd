"""An engine that loads its model when the first question comes, and leaves the memory to others until then.

On a single GPU a model that only waits for questions would take memory from a training.
"""

import contextvars
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterator

import torch

from onecard.config.generation import ActiveAdapters
from onecard.errors import MEMORY, UserError, is_out_of_memory
from onecard.inference import engine as inference_engine
from onecard.inference.loader import EnginePlan
from onecard.system import hardware

LOOK_AGAIN = 2.0  # seconds between two looks at the runs on the same device


class Engine:
    """An engine.Engine with a known name, capabilities and adapters; opening a sequence loads the model."""

    def __init__(
        self,
        plan: EnginePlan,
        load: Callable[[], inference_engine.Engine],
        beside: Callable[[str], list[str]],
    ) -> None:
        """load: loads the engine; beside: device -> names of the runs that are trained on it now."""
        self.name, self.capabilities = plan.kind.name, plan.kind.capabilities
        self.adapters = [adapter.name for adapter in plan.model.adapters]
        self.device, self._beside = plan.device.value, beside
        # the thread of a page loads it in the session (hub/session.py) of the command that resolved the model
        self._load: Callable[[], inference_engine.Engine] = functools.partial(
            contextvars.copy_context().run, load
        )
        self.lock = threading.Lock()
        self.engine: inference_engine.Engine | None = None
        self.closed = False
        self.seen: tuple[float, list[str]] = (float("-inf"), [])

    @property
    def is_loaded(self) -> bool:
        return self.engine is not None and self.engine.is_loaded

    def why_ended(self) -> str:
        return self.engine.why_ended() if self.engine is not None else ""

    def load(self) -> None:
        """Load the model. Raises UserError (exit 6) when memory is short; the next question tries again."""
        self._loaded()

    def _loaded(self) -> inference_engine.Engine:
        """The engine, loaded if it was not; a second caller waits for the first."""
        with self.lock:
            if self.closed:
                raise RuntimeError("The engine is closed.")
            if not self.is_loaded:
                try:
                    if self.engine is None:
                        self.engine = self._load()
                    self.engine.load()  # that of a child process may have ended
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    error.__traceback__ = None  # its frames hold the weights that were read so far
                    hardware.forget_cached_memory("cuda" if self.device == "all" else self.device)
                    others = ", ".join(self._names_beside())
                    problem = "Out of memory while the model was loaded."
                    fix = f"Wait for {others}, or stop it." if others else "Start with fewer --bits."
                    raise UserError(problem, fix, MEMORY) from None
            assert self.engine is not None
            return self.engine

    def _names_beside(self) -> list[str]:
        """Names of the runs that are trained on the same device now."""
        when, names = self.seen
        if time.monotonic() - when > LOOK_AGAIN:
            names = self._beside(self.device)
            self.seen = time.monotonic(), names
        return names

    @property
    def placement(self) -> inference_engine.Placement:
        here = inference_engine.Placement(self.device) if self.engine is None else self.engine.placement
        return dataclasses.replace(here, beside=tuple(self._names_beside()))

    @property
    def context(self) -> int:
        if self.engine is None:
            raise RuntimeError("The length of the context is not known before the weights are loaded.")
        return self.engine.context

    def check_active_adapters(self, active_adapters: ActiveAdapters) -> None:
        """Raise UserError when these adapters cannot be active; before loading only names are checked."""
        if self.engine is not None:
            self.engine.check_active_adapters(active_adapters)
        for name, _ in active_adapters:
            inference_engine.check_adapter(name, self.adapters)

    def open(self, prompt: list[int], active_adapters: ActiveAdapters = ()) -> inference_engine.Sequence:
        return self._loaded().open(prompt, active_adapters)

    def each(self, ids: list[int], active_adapters: ActiveAdapters = ()) -> Iterator[torch.Tensor]:
        return self._loaded().each(ids, active_adapters)

    def forget(self) -> None:
        if self.engine is not None:
            self.engine.forget()

    def close(self) -> None:
        with self.lock:
            self.closed = True
            if self.engine is not None:
                self.engine.close()


def _is_an_engine(engine: Engine) -> inference_engine.Engine:
    """For the type checker alone."""
    return engine
