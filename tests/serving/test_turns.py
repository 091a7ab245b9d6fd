"""The queue is bounded and fair, and no place is ever lost."""

import asyncio
import random

import pytest

from onecard.serving.refusals import RequestError
from onecard.serving.turns import Turns


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_keys_take_turns():
    """A key with ten requests in front does not make another one wait for all of them."""

    async def run() -> str:
        turns, order = Turns(1, 100), []

        async def ask(key):
            await turns.take(key)
            order.append(key)
            await asyncio.sleep(0)
            turns.leave(key)

        tasks = [asyncio.create_task(ask("a")) for _ in range(10)]
        await settle()
        tasks += [asyncio.create_task(ask(key)) for key in "bbc"]
        await asyncio.gather(*tasks)
        assert (turns.answering, turns.waiting) == (0, 0)
        return "".join(order)

    order = asyncio.run(run())
    assert sorted(order) == sorted("a" * 10 + "bbc")
    last_other = max(place for place, key in enumerate(order) if key != "a")
    assert last_other - order.index("b") < 6


def test_the_key_with_fewer_running_requests_is_next():
    async def run() -> list[str]:
        turns, order = Turns(2, 100), []

        async def ask(key):
            await turns.take(key)
            order.append(key)

        await ask("a")
        await ask("a")
        tasks = [asyncio.create_task(ask(key)) for key in "ab"]
        await settle()
        turns.leave("a")
        await settle()
        for task in tasks:
            task.cancel()
        return order

    assert asyncio.run(run()) == ["a", "a", "b"]


def test_a_full_queue_refuses_with_a_time():
    """A9"""

    async def run() -> RequestError:
        turns = Turns(1, 2)
        await turns.take("a")
        tasks = [asyncio.create_task(turns.take("a")) for _ in range(2)]
        await settle()
        with pytest.raises(RequestError) as refused:
            await turns.take("a")
        with pytest.raises(RequestError):
            turns.check("a")
        for task in tasks:
            task.cancel()
        await settle()
        assert turns.waiting == 0
        return refused.value

    error = asyncio.run(run())
    assert error.status == 429
    assert error.retry_after >= 1


def test_a_full_queue_of_one_key_keeps_no_other_out():
    """The newest request of the key with the most waiting ones gives way, down to an equal share."""

    async def run() -> None:
        turns = Turns(1, 4)
        await turns.take("greedy")
        greedy = [asyncio.create_task(turns.take("greedy")) for _ in range(4)]
        await settle()
        others = []
        for _ in range(2):
            others.append(asyncio.create_task(turns.take("other")))
            await settle()
        assert [task.done() for task in greedy] == [False, False, True, True]
        assert all(task.exception().status == 429 for task in greedy[2:])
        assert not any(task.done() for task in others)
        with pytest.raises(RequestError):
            await turns.take("other")
        for task in [*greedy[:2], *others]:
            task.cancel()
        await settle()
        assert turns.waiting == 0

    asyncio.run(run())


def test_stopping_refuses_who_waits():
    async def run() -> None:
        turns = Turns(1, 9)
        await turns.take("a")
        waiting = [asyncio.create_task(turns.take(key)) for key in "abc"]
        await settle()
        turns.refuse_waiting()
        await settle()
        assert [task.exception().status for task in waiting] == [503] * 3

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(5))
def test_no_place_is_lost(seed):
    """Random arrivals, ends and cancellations: never more than the places, and in the end all are free."""

    async def run() -> None:
        rng, turns = random.Random(seed), Turns(3, 6)
        tasks, ended = [], 0

        async def ask(key):
            nonlocal ended
            await turns.take(key)
            try:
                assert turns.answering <= 3
                await asyncio.sleep(rng.random() / 500)
                ended += 1
            finally:
                turns.leave(key)

        for _ in range(300):
            tasks.append(asyncio.create_task(ask(rng.choice("abcd"))))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            if rng.random() < 0.7:
                await asyncio.sleep(rng.random() / 1000)
            assert turns.waiting <= 6
        results = await asyncio.gather(*tasks, return_exceptions=True)
        refused = [each for each in results if isinstance(each, RequestError)]
        assert not [each for each in results if isinstance(each, AssertionError)]
        assert ended > 50
        assert all(each.status == 429 for each in refused)
        assert (turns.answering, turns.waiting, turns.queues, turns.running) == (0, 0, {}, {})

    asyncio.run(run())
