"""The context of llama.cpp in one child process: what its sequences hold, and decode calls for several.

One call at a time may use it; batching.py sees to that. When the child has ended, its context is dead, and
every step of it raises the reason; the engine makes a new one.

Legend: V entries of the vocabulary.
"""

import contextlib

import torch

from onecard.errors import UserError
from onecard.inference import slots as inference_slots
from onecard.inference.batching import Share
from onecard.inference.llama_cpp_model import Part
from onecard.inference.llama_cpp_process import ModelProcess
from onecard.inference.slots import Mixture, Slot


class Context:
    """A started child process and its sequences."""

    def __init__(self, process: ModelProcess, sequences: int):
        self.process = process
        self.slots = [Slot(number) for number in range(sequences)]
        self.active: Mixture = ()
        self.rows = [torch.empty(1, process.entries) for _ in self.slots]  # a slot's steps write scores here

    @property
    def is_dead(self) -> bool:
        return self.process.death is not None

    def open(self, prompt: list[int], mixture: Mixture) -> Slot:
        """A slot for a prompt, with as much of its beginning as a slot has; one of them must be free."""
        place = inference_slots.place_for(prompt, mixture, self.slots)
        assert place
        slot, source, keep = place.slot, place.source, place.keep
        if source is not slot:
            keep = self.process.copy(source.number, slot.number, keep)
        elif keep < len(slot.ids) or slot.is_stale:
            keep = self.process.cut(slot.number, keep)
        slot.ids, slot.mixture, slot.is_stale = source.ids[:keep], mixture, False
        slot.is_open, slot.answers, slot.is_late = True, False, False
        return slot

    def add(self, batch: list[Share]) -> None:
        """One decode call for all shares, which are of one mixture; sets count or error of each step.

        When it fails, each sequence tries again by itself, so that only those fail that have to.
        """
        try:
            self._decode(batch)
        except UserError as error:
            for share in batch:
                share.step.error = UserError(error.problem, error.fix, error.code)
        except (MemoryError, RuntimeError) as error:
            if len(batch) == 1:
                batch[0].step.slot.is_stale = True
                batch[0].step.error = error
                return
            for share in batch:
                if self._undo(share.step.slot):
                    self.add([share])
                else:
                    share.step.error = RuntimeError(str(error))

    def _undo(self, slot: Slot) -> bool:
        """Let a slot hold what it held before a decode call that failed; returns whether that succeeded."""
        with contextlib.suppress(UserError):
            slot.is_stale = self.process.cut(slot.number, len(slot.ids)) < len(slot.ids)
            return not slot.is_stale
        return False

    def _decode(self, batch: list[Share]) -> None:
        mixture = batch[0].step.slot.mixture
        if mixture != self.active:
            self.activate(mixture)
        parts, rooms = [], []
        for step, count in batch:
            rows = count if step.each else int(bool(step.room) and count == len(step.ids))
            if rows:
                rooms.append(step.room[: 4 * rows * self.process.entries])
            parts.append(Part(step.slot.number, len(step.slot.ids), step.ids[:count], rows))
        self.process.decode(parts, rooms)
        for step, count in batch:
            step.slot.ids += step.ids[:count]
            step.count = count

    def activate(self, mixture: Mixture) -> None:
        """Let the adapters of this mixture be the active ones."""
        self.process.activate(dict(mixture))
        self.active = mixture
