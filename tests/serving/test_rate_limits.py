"""Rate limits: how many requests a key may make, and how many wrong keys an address may send."""

import time

import limits.storage.memory
import pytest

from onecard.serving import rate_limits
from onecard.serving.keys import Key
from onecard.serving.rate_limits import RateLimits, Windows


class Clock:
    """A clock in the place of the module time, for the library and for us."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def time(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits.storage.memory.time, "time", clock.time)
    return clock


def key(name: str, per_minute: int = 3) -> Key:
    return Key(f"key-{name}", name, name, frozenset({"chat"}), per_minute, None)


def test_a_burst_is_cut_at_the_limit_of_the_key(clock):
    """A8: as many as the key allows; the wait is until the first of them is a minute old, and is enough."""
    requests = RateLimits()
    waits = []
    for _ in range(10):
        waits.append(requests.wait_of(key("a")))
        clock.seconds += 1
    assert waits == [0, 0, 0, 57, 56, 55, 54, 53, 52, 51]
    assert requests.wait_of(key("b")) == 0, "others go on"
    clock.seconds += 50
    assert requests.wait_of(key("a")) > 0, "the window moves and does not begin anew"
    clock.seconds += requests.wait_of(key("a"))
    assert requests.wait_of(key("a")) == 0


def test_refused_requests_are_not_counted(clock):
    requests = RateLimits()
    for _ in range(100):
        requests.wait_of(key("a"))
    clock.seconds += 61
    assert [requests.wait_of(key("a")) for _ in range(4)] == [0, 0, 0, 60]


def test_many_wrong_keys(clock):
    """A8: 1,000 from one address are slowed; other addresses and valid keys are not."""
    requests = RateLimits(failures_per_minute=20)
    waits = [requests.wait_after_failure("192.0.2.1") for _ in range(1000)]
    assert (waits.count(0), min(waits[20:])) == (20, 60)
    assert requests.wait_after_failure("192.0.2.2") == 0
    assert requests.wait_of(key("a")) == 0


def test_the_tables_are_bounded(clock):
    """A8: ever new addresses fill neither our table nor the library's; the latest ones are still known."""
    windows = Windows(most=50)
    for number in range(1000):
        assert windows.take(f"address {number}", 1) == 0
    assert len(windows) == 50
    assert len(windows._storage.events) <= 50
    assert [windows.take(f"address {number}", 1) for number in (999, 950)] == [60, 60]
    assert windows.take("address 0", 1) == 0


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("testclient", "unknown"),
        ("", "unknown"),
    ],
)
def test_what_counts_as_one_client(address, network):
    assert rate_limits.network_of(address) == network


def test_a_wait_is_at_least_a_second():
    """With the true clock: Retry-After is a whole number of seconds and never 0 for a refused request."""
    windows, began = Windows(most=5), time.time()
    assert windows.take("a", 1) == 0
    wait = windows.take("a", 1)
    assert 1 <= wait <= 60
    assert wait >= 60 - (time.time() - began)
