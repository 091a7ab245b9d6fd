"""How many requests a key may make in a minute, and how many wrong keys an address may send.

The windows move and are in memory: after a restart they begin anew. Tables have a bounded size, so requests
from ever new addresses do not fill the memory.
"""

import collections
import ipaddress
import math
import threading
import time

import limits
import limits.storage
import limits.strategies

from onecard.serving.keys import Key

FAILURES = 20  # wrong keys per minute and address
MOST_KEYS, MOST_ADDRESSES = 10_000, 10_000  # entries of the two tables
IPV6_NETWORK = 64  # bits; one subscriber has all addresses of such a network
SHORTEST_WAIT = 1  # second


class Windows:
    """Moving windows by name, at most so many of them: the one that was used longest ago makes room."""

    def __init__(self, most: int):
        self.most = most
        self._storage = limits.storage.MemoryStorage()
        self._limiter = limits.strategies.MovingWindowRateLimiter(self._storage)
        self._last: collections.OrderedDict[str, None] = collections.OrderedDict()  # the latest at the end
        self._lock = threading.Lock()

    def take(self, name: str, per_minute: int) -> int:
        """Count a request. Returns 0, or the seconds until there is room for one; then it is not counted."""
        limit = limits.RateLimitItemPerMinute(per_minute)
        with self._lock:
            entry = limit.key_for(name)
            self._last[entry] = None
            self._last.move_to_end(entry)
            while len(self._last) > self.most:
                self._storage.clear(self._last.popitem(last=False)[0])  # the library keeps empty windows
            if self._limiter.hit(limit, name):
                return 0
            reset = self._limiter.get_window_stats(limit, name).reset_time
        return max(SHORTEST_WAIT, math.ceil(reset - time.time()))

    def __len__(self) -> int:
        return len(self._last)


class RateLimits:
    """The limits of one service; thread-safe."""

    def __init__(self, failures_per_minute: int = FAILURES):
        self.failures_per_minute = failures_per_minute
        self.keys, self.addresses = Windows(MOST_KEYS), Windows(MOST_ADDRESSES)

    def wait_of(self, key: Key) -> int:
        """Count a request of a valid key. Returns 0, or the seconds after which it may ask again."""
        return self.keys.take(key.id, key.requests_per_minute)

    def wait_after_failure(self, address: str) -> int:
        """Count a wrong key of an address. Returns 0, or the seconds after which the address may try again.

        Call it for refused keys alone. So a valid key is never refused for what others send from its address,
        such as that of a proxy.
        """
        return self.addresses.take(network_of(address), self.failures_per_minute)


def network_of(address: str) -> str:
    """What counts as one client: an IPv4 address, or the network of an IPv6 address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:  # a Unix socket
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped or ipaddress.ip_network((parsed, IPV6_NETWORK), strict=False))
    return str(parsed)
