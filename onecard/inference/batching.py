"""Steps that several threads ask for become batches: each of one mixture of adapters, one batch at a time.

No thread of its own does this. Of the threads that wait for their steps, one is on duty: it waits a moment
for those that are about to ask, takes all steps of one mixture, runs them together, and hands the duty on
once its own step is done. A thread that is alone runs its step at once.

The mixture whose oldest step has waited longest comes next. A batch waits only for open slots of its mixture,
at most half as long as a step took last (a latecomer would have to wait for a whole one), and not again for a
slot that did not come in time. Prompts share what answers leave of a batch; beside answers they get few
tokens of it, so a long prompt delays the answers only a little.

Legend: V entries of the vocabulary.
"""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from onecard.inference.slots import Mixture, Slot

BESIDE = 32  # tokens of prompts in a batch while an answer grows
SHORTEST, LONGEST = 0.001, 0.02  # seconds that a batch waits for slots that are about to ask


class Pool(Protocol):
    """The slots of one context."""

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def is_dead(self) -> bool:
        """Whether a step has found that nothing can be computed here any more."""
        ...

    def add(self, batch: "list[Share]") -> None:
        """Compute what the shares ask for, all of one mixture, and set count or error of each step."""
        ...


@dataclasses.dataclass(eq=False)
class Step:
    """What a thread asks for: to add these ids to a slot, and perhaps the scores after them."""

    pool: Pool
    slot: Slot
    ids: list[int]
    room: memoryview  # the scores are written here: the bytes of [V], or of [len(ids), V], in fp32; or empty
    each: bool = False  # whether the scores after each of the ids are needed; otherwise those after the last
    count: int = 0  # ids that were added; fewer than all where a batch had no room for more
    error: BaseException | None = None
    is_running: bool = False
    is_done: bool = False
    since: float = 0.0  # when it was asked for


class Share(NamedTuple):
    """The part of a step that a batch has room for."""

    step: Step
    tokens: int  # of its ids


class Batching:
    """The steps and new prompts of all threads that use one engine."""

    def __init__(self, most: int):
        """most: tokens of a batch, at least as many as a context has slots."""
        self.most = most
        self.lock = threading.Lock()
        self.on_duty: Step | None = None
        self.news = threading.Condition(self.lock)  # for the thread on duty
        self.turns = threading.Condition(self.lock)  # for those that wait for a batch or a slot to end
        self.wakes: dict[Step, threading.Condition] = {}  # of the steps that wait, the oldest first
        self.busy = False  # whether a batch runs, or a new prompt gets its slot
        self.arrivals: list[object] = []  # new prompts that wait for a slot, the oldest first
        self.entering: set[object] = set()  # those of them whose thread waits in enter() now
        self.pool: Pool | None = None  # whose slots new prompts get
        self.patience = SHORTEST

    def step(self, step: Step) -> int:
        """Wait until the step is done; returns how many of its ids were added, at least one.

        Raises what the run of its batch has set as its error.
        """
        with self.lock:
            if len(step.pool.slots) == 1 and not self.busy and not self.wakes:
                self._run([Share(step, min(len(step.ids), self.most))])  # it shares with nobody
                self.news.notify()
            else:
                self._wait_for(step)
        if step.error:
            raise step.error
        return step.count

    def _wait_for(self, step: Step) -> None:
        """Wait until the step is done, on duty or not."""
        self._ask(step)
        try:
            while not step.is_done:
                self.on_duty = self.on_duty or step
                if self.on_duty is not step:
                    self.wakes[step].wait()
                    continue
                batch, seconds = self._next()
                if batch:
                    self._run(batch)
                else:
                    self.news.wait(seconds)
        finally:
            self.wakes.pop(step, None)
            if self.on_duty is step:
                self.on_duty = None
                successor = next((one for one in self.wakes if not one.is_done), None)
                if successor:
                    self.wakes[successor].notify()

    def withdraw(self, slot: Slot, error: BaseException) -> None:
        """End the step of a slot with an error, unless its batch runs already."""
        with self.lock:
            for step, wake in self.wakes.items():
                if step.slot is slot and not step.is_running:
                    step.error, step.is_done = error, True
                    wake.notify()
                    self.news.notify()

    def arrive(self, arrival: object) -> None:
        """Let a new prompt wait for a slot, behind those that came before it."""
        with self.lock:
            self.arrivals.append(arrival)

    def enter(self, arrival: object, seconds: float) -> bool:
        """Wait until it is this prompt's turn and a slot is free; returns whether that came in time.

        Then nothing else runs, and the prompt no longer waits, until leave().
        """
        with self.lock:
            self.entering.add(arrival)
            try:
                turn = self.turns.wait_for(lambda: not self.busy and self._next_arrival() is arrival, seconds)
            finally:
                self.entering.discard(arrival)
            if turn:
                self.arrivals.remove(arrival)
                self.busy = True
            else:
                self._tell()
            return turn

    def give_up(self, arrival: object) -> None:
        """Let a new prompt wait no longer, if it does."""
        with self.lock:
            if arrival in self.arrivals:
                self.arrivals.remove(arrival)
            self._tell()

    def leave(self) -> None:
        """End what enter() began."""
        with self.lock:
            self.busy = False
            self._tell()

    def close(self, slot: Slot, closed: int) -> None:
        """Let another prompt have the slot."""
        with self.lock:
            slot.is_open, slot.answers, slot.closed = False, False, closed
            self._tell()

    def wait_until_unused(self) -> None:
        """Wait until no slot is open; then nothing else runs until leave()."""
        with self.lock:
            self.turns.wait_for(lambda: not self.busy and not self._open())
            self.busy = True

    def _tell(self) -> None:
        self.turns.notify_all()
        self.news.notify()

    def _open(self) -> bool:
        return (
            self.pool is not None and not self.pool.is_dead and any(slot.is_open for slot in self.pool.slots)
        )

    def _next_arrival(self) -> object | None:
        """The new prompt that gets a slot now, if one is free."""
        if self.pool is not None and not self.pool.is_dead and all(slot.is_open for slot in self.pool.slots):
            return None
        return next((arrival for arrival in self.arrivals if arrival in self.entering), None)

    def _ask(self, step: Step) -> None:
        step.since = time.monotonic()
        step.slot.is_late, step.slot.answers = False, len(step.ids) == 1 and not step.each
        self.wakes[step] = threading.Condition(self.lock)
        if self.on_duty is not None and not self.busy and self._next()[0]:
            self.news.notify()

    def _run(self, batch: list[Share]) -> None:
        """Run a batch without the lock; its steps are done afterwards, whatever happened."""
        self.busy = True
        for share in batch:
            share.step.is_running = True
        self.lock.release()
        started = time.monotonic()
        try:
            batch[0].step.pool.add(batch)
        finally:
            seconds = time.monotonic() - started
            self.lock.acquire()
            self.busy = False
            if all(share.tokens == 1 for share in batch):
                self.patience = min(max(seconds / 2, SHORTEST), LONGEST)
            for step, _ in batch:
                if not step.count and not step.error:
                    step.error = RuntimeError("The step was interrupted.")
                step.is_done = True
                if step in self.wakes:
                    self.wakes[step].notify()
            self.turns.notify_all()

    def _next(self) -> tuple[list[Share], float | None]:
        """The batch to run now; if there is none, the seconds to wait, or None: until news come."""
        if self.busy or self._next_arrival():
            return [], None
        groups: dict[tuple[int, Mixture], list[Step]] = {}
        for step in self.wakes:
            if not step.is_done:
                groups.setdefault((id(step.pool), step.slot.mixture), []).append(step)
        now, first = time.monotonic(), None
        for steps in sorted(groups.values(), key=lambda steps: min(step.since for step in steps)):
            missing = self._missing(steps)
            left = min(step.since for step in steps) + self.patience - now
            if not missing or left <= 0:
                for slot in missing:
                    slot.is_late = True
                return self._shares(steps), None
            first = left if first is None else min(first, left)
        return [], first

    def _missing(self, steps: list[Step]) -> list[Slot]:
        """Open slots of this mixture that have not asked yet, but are about to."""
        asking = {step.slot for step in steps}
        mixture, slots = steps[0].slot.mixture, steps[0].pool.slots
        return [
            slot
            for slot in slots
            if slot.is_open and slot.mixture == mixture and not slot.is_late and slot not in asking
        ]

    def _shares(self, steps: list[Step]) -> list[Share]:
        """As much of the steps as a batch has room for: answers first, then prompts in equal parts."""
        answers = [Share(step, 1) for step in steps if step.slot.answers][: self.most]
        prompts = [step for step in steps if not step.slot.answers]
        room = self.most - len(answers)
        if any(slot.is_open and slot.answers for slot in steps[0].pool.slots):
            room = max(min(room, BESIDE), len(prompts))  # each goes on
        shares = []
        for number, step in enumerate(prompts):
            count = min(len(step.ids), room // (len(prompts) - number))
            if count:
                shares.append(Share(step, count))
                room -= count
        return answers + shares
