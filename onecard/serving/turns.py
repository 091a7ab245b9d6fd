"""Whose request is answered next: a bounded queue that is fair between keys.

All of it runs in one event loop. Each key has a queue of its own, and the keys take turns. When the queue is
full, the key with the most waiting requests loses its newest one to a key that has at least two fewer, so no
key can keep others out.
"""

import asyncio
import collections

from onecard.serving import refusals
from onecard.serving.refusals import TOO_MANY, RequestError

SECONDS_PER_REQUEST = 5  # a guess of how long one takes, for Retry-After


class Turns:
    """Places at which requests are answered, and those who wait for one."""

    def __init__(self, at_once: int, most_waiting: int):
        self.at_once, self.most_waiting = at_once, most_waiting
        # key -> its requests that have a place
        self.running = collections.Counter[str]()
        # key -> who waits, the oldest first; the key at the front has had no place for the longest time
        self.queues = collections.OrderedDict[str, collections.deque[asyncio.Future[None]]]()

    @property
    def answering(self) -> int:
        return self.running.total()

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues.values()))

    def check(self, key: str) -> None:
        """Raise RequestError 429 when a request of this key would find no room in the queue now."""
        if self.waiting >= self.most_waiting and self.answering >= self.at_once and not self._greedier(key):
            raise self._full()

    async def take(self, key: str) -> None:
        """Wait for a place; raises RequestError 429 when there is no room to wait, 503 when the server stops.

        Whoever has a place gives it back with `leave`. A cancelled wait leaves the queue.
        """
        if self.answering < self.at_once and not self.queues:
            self.running[key] += 1
            return
        self.check(key)
        if self.waiting >= self.most_waiting and (greedy := self._greedier(key)):
            self._refuse(self.queues[greedy].pop(), self._full())
            self._forget_if_empty(greedy)
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.queues.setdefault(key, collections.deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled() and mine.exception() is None:
                self.leave(key)  # the place came at the same moment
            elif mine in self.queues.get(key, ()):
                self.queues[key].remove(mine)
                self._forget_if_empty(key)
            raise

    def leave(self, key: str) -> None:
        """Give the place back; the next one in turn gets it."""
        self.running[key] -= 1
        if not self.running[key]:
            del self.running[key]
        while self.queues and self.answering < self.at_once:
            following = min(self.queues, key=lambda each: self.running[each])  # of equals the first
            first = self.queues[following].popleft()
            self.queues.move_to_end(following)
            self._forget_if_empty(following)
            if not first.done():
                self.running[following] += 1
                first.set_result(None)

    def refuse_waiting(self) -> None:
        """Let nobody wait any longer, because the server stops."""
        for queue in self.queues.values():
            for mine in queue:
                self._refuse(mine, refusals.stopping())
        self.queues.clear()

    def _greedier(self, key: str) -> str | None:
        """The key with the most waiting requests, if it has at least two more than this one."""
        most = max(self.queues, key=lambda each: len(self.queues[each]), default=None)
        mine = len(self.queues.get(key, ()))
        return most if most is not None and len(self.queues[most]) >= mine + 2 else None

    def _full(self) -> RequestError:
        wait = max(1, SECONDS_PER_REQUEST * (self.waiting + 1) // max(1, self.at_once))
        message = f"{self.waiting} requests are waiting already. Try again later."
        return RequestError(TOO_MANY, message, code="queue_full", retry_after=wait)

    def _forget_if_empty(self, key: str) -> None:
        if not self.queues.get(key, True):
            del self.queues[key]

    @staticmethod
    def _refuse(waiting: "asyncio.Future[None]", why: RequestError) -> None:
        if not waiting.done():
            waiting.set_exception(why)
