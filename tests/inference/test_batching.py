"""Who is computed when: steps of one mixture go together, mixtures take turns, prompts delay no answers.

The model is a stand-in that records its batches.
"""

import itertools
import threading
import time

import pytest

from onecard.errors import UserError
from onecard.inference import batching
from onecard.inference.batching import Batching, Share, Step
from onecard.inference.llama_cpp_restarts import FREE, Restarts
from onecard.inference.slots import Mixture, Slot, mixture_of, place_for

A, B, BASE = (("a", 1.0),), (("b", 1.0),), ()


class Model:
    """Adds what it is asked to add; a batch takes long enough for threads to ask in the meantime."""

    is_dead = False

    def __init__(self, *mixtures: Mixture, seconds: float = 0.02):
        self.slots = [Slot(number, mixture, is_open=True) for number, mixture in enumerate(mixtures)]
        self.batches: list[list[Share]] = []
        self.seconds, self.running = seconds, 0

    def add(self, batch: list[Share]) -> None:
        self.running += 1
        assert self.running == 1, "two batches at once"
        assert len({share.step.slot.mixture for share in batch}) == 1
        assert len({share.step.slot for share in batch}) == len(batch)
        self.batches.append(batch)
        time.sleep(self.seconds)
        for step, tokens in batch:
            step.count = tokens
        self.running -= 1

    def mixtures(self) -> list[Mixture]:
        return [batch[0].step.slot.mixture for batch in self.batches]


def ask(turns: Batching, model: Model, number: int, ids: list[int], times: int = 1) -> None:
    for _ in range(times):
        turns.step(Step(model, model.slots[number], ids, memoryview(b"")))


def together(*works) -> None:
    threads = [threading.Thread(target=work[0], args=work[1:]) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def answers(turns: Batching, model: Model, number: int, times: int) -> None:
    """Tokens of an answer, and then the slot is free."""
    ask(turns, model, number, [1], times)
    turns.close(model.slots[number], 1)


def test_answers_of_a_mixture_are_computed_together():
    model, turns = Model(*[A] * 6), Batching(256)
    turns.pool = model
    together(*[(answers, turns, model, number, 15) for number in range(6)])
    assert len(model.batches) < 40, "most of 90 steps share a batch"
    assert not turns.wakes
    assert turns.on_duty is None


def test_one_alone_waits_for_nobody():
    """No time is lost to a slot that never asks again, apart from once."""
    model, turns = Model(A, A, seconds=0), Batching(256)
    turns.patience = 0.2
    started = time.monotonic()
    ask(turns, model, 0, [1])
    assert time.monotonic() - started > 0.15
    turns.patience = 5
    started = time.monotonic()
    ask(turns, model, 0, [1], 20)
    assert time.monotonic() - started < 2


def test_mixtures_take_turns():
    """One answer of B beside six of A: B is never more than two batches of A away."""
    model, turns = Model(A, A, A, A, A, A, B), Batching(256)
    together(*[(answers, turns, model, number, 12) for number in range(7)])
    order = "".join("B" if mixture == B else "A" for mixture in model.mixtures())
    assert "AAAA" not in order[: order.rindex("B")]
    assert order.count("B") == 12


def test_three_mixtures_go_round():
    """Whoever asked longest ago comes next, so none waits for more than one batch of each other mixture."""
    model, turns = Model(A, B, BASE), Batching(256)
    together(*[(answers, turns, model, number, 12) for number in range(3)])
    order = model.mixtures()
    for mixture in (A, B, BASE):
        places = [place for place, one in enumerate(order) if one == mixture]
        assert len(places) == 12
        assert max(after - before for before, after in itertools.pairwise(places)) <= 4


def test_a_long_prompt_holds_no_answer_up():
    """Beside an answer a batch has few tokens of the prompt, and each batch has the answer's next token."""
    model, turns = Model(A, A), Batching(256)
    left = [5] * 600
    model.slots[0].answers = True

    def read() -> None:
        nonlocal left
        while left:
            step = Step(model, model.slots[1], left[:256], memoryview(b""))
            left = left[turns.step(step) :]
        turns.close(model.slots[1], 1)

    together((read,), (answers, turns, model, 0, 12))
    beside = [batch for batch in model.batches if len(batch) == 2]
    assert len(beside) >= 10
    assert {share.tokens for batch in beside for share in batch} <= {1, batching.BESIDE}
    sizes = [share.tokens for batch in model.batches for share in batch if share.step.slot.number == 1]
    assert sum(sizes) == 600
    assert max(sizes) > batching.BESIDE, "alone it is read in large parts"


def test_prompts_share_a_batch_evenly():
    model, turns = Model(*[A] * 5, seconds=0), Batching(64)
    steps = [Step(model, slot, [7] * 60, memoryview(b"")) for slot in model.slots]
    assert [share.tokens for share in turns._shares(steps)] == [12, 13, 13, 13, 13]
    model.slots[0].answers = True  # an answer that is not in this batch
    prompts = turns._shares(steps[1:])
    assert [share.tokens for share in prompts] == [8] * 4
    assert min(share.tokens for share in Batching(4)._shares(steps[1:])) == 1


def test_a_waiting_step_can_be_withdrawn():
    """Its mixture waits behind a slow batch of another one: cancelling ends the wait at once."""
    model, turns = Model(A, B, seconds=1.0), Batching(256)
    caught, begun = [], threading.Event()

    def wait() -> None:
        begun.wait(10)
        time.sleep(0.05)
        started = time.monotonic()
        with pytest.raises(RuntimeError, match="over"):
            ask(turns, model, 1, [1])
        caught.append(time.monotonic() - started)

    def withdraw() -> None:
        begun.set()
        time.sleep(0.2)
        turns.withdraw(model.slots[1], RuntimeError("over"))

    together((ask, turns, model, 0, [1]), (wait,), (withdraw,))
    assert caught[0] < 0.7
    assert model.mixtures() == [A]
    assert not turns.wakes


def test_an_error_of_a_batch_reaches_each_thread():
    class Broken(Model):
        def add(self, batch: list[Share]) -> None:
            for share in batch:
                share.step.error = ValueError(share.step.slot.number)

    model, turns, errors = Broken(A, A, B), Batching(256), []

    def fail(number: int) -> None:
        try:
            ask(turns, model, number, [1])
        except ValueError as error:
            errors.append(error.args[0])
        turns.close(model.slots[number], 1)

    together(*[(fail, number) for number in range(3)])
    assert sorted(errors) == [0, 1, 2]


def test_an_interrupted_batch_leaves_nobody_waiting():
    class Interrupted(Model):
        def add(self, batch: list[Share]) -> None:
            raise KeyboardInterrupt

    model, turns, errors = Interrupted(A, A), Batching(256), []
    turns.patience = 0.5

    def fail(number: int) -> None:
        try:
            ask(turns, model, number, [1])
        except BaseException as error:
            errors.append(type(error))

    together((fail, 0), (fail, 1))
    assert sorted(kind.__name__ for kind in errors) == ["KeyboardInterrupt", "RuntimeError"]
    assert not turns.busy


def test_new_prompts_get_slots_in_their_order():
    """One whose caller is not waiting at the moment holds nobody up."""
    model, turns, order = Model(A), Batching(256), []
    turns.pool = model
    stalled = object()
    turns.arrive(stalled)

    def come(name: str) -> None:
        turns.arrive(name)
        assert turns.enter(name, 30)
        order.append(name)
        turns.leave()

    first, second = threading.Thread(target=come, args=("one",)), threading.Thread(target=come, args=("two",))
    first.start()
    time.sleep(0.1)
    second.start()
    time.sleep(0.1)
    assert not turns.enter(stalled, 0.05), "the only slot is open"
    turns.close(model.slots[0], 1)
    first.join(30)
    second.join(30)
    assert order == ["one", "two"]
    turns.give_up(stalled)
    assert not turns.arrivals


def slots(*contents: tuple[Mixture, list[int]]) -> list[Slot]:
    return [Slot(n, mixture, ids, closed=n + 1) for n, (mixture, ids) in enumerate(contents)]


def test_a_prompt_gets_only_what_its_own_mixture_read():
    held = slots((A, [1, 2, 3, 4]), (B, [1, 2]), (BASE, []))
    place = place_for([1, 2, 3, 4, 5], B, held)
    assert (place.source.number, place.keep) == (1, 2)
    place = place_for([1, 2, 3, 4, 5], (("a", 0.5),), held)
    assert place.keep == 0
    held[0].is_stale = True
    assert place_for([1, 2, 3, 4, 5], A, held).keep == 0


def test_the_conversation_that_goes_on_keeps_its_slot():
    """One that shares only a short beginning with it is copied, and the slot closed first gives way."""
    held = slots((A, [1, 2, 3, 4, 5, 6]), (A, [9, 9]), (A, [8]))
    assert place_for([1, 2, 3, 4, 5, 6, 7], A, held).slot is held[0]
    place = place_for([1, 2, 7], A, held)
    assert (place.slot, place.source, place.keep) == (held[1], held[0], 2)
    held[0].is_open = True
    place = place_for([1, 2, 3, 4, 5, 6, 7], A, held)
    assert (place.slot, place.source, place.keep) == (held[1], held[0], 6)
    assert place_for([1, 2, 3], A, held[:1]) is None
    assert place_for([1, 2, 3], A, slots((A, [1, 2, 3]))).keep == 2, "one token is left for the scores"


def test_one_mixture_has_one_name():
    assert mixture_of((("b", 0.5), ("a", 1), ("c", 0.0))) == (("a", 1.0), ("b", 0.5))
    assert mixture_of((("a", 0.0),)) == mixture_of(()) == BASE


def test_a_child_that_ends_again_and_again_is_left_alone(tmp_path):
    now = [0.0]
    restarts = Restarts(tmp_path / "model.gguf", lambda: now[0])
    pauses = []

    def is_too_early() -> bool:
        try:
            restarts.check()
        except UserError as error:
            return "model.gguf" in error.problem and "Ask again in" in error.fix
        return False

    for _ in range(FREE + 4):
        since = now[0]
        while is_too_early():
            now[0] += 1
        pauses.append(now[0] - since)
        restarts.started()
    assert pauses == [0] * FREE + [2, 4, 8, 16]
    now[0] += 100
    restarts.check()
