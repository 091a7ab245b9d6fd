"""The children of tests/support/harness.py: what they say arrives, and one that does not end is killed."""

import os
import time

import pytest

from tests.support import harness

REQUEST = {"program": "finetune", "argv": [], "fault": {}}


@pytest.fixture
def children(monkeypatch):
    """A function that lets the next children do something else than a training."""

    def set_work(work) -> None:
        monkeypatch.setattr(harness, "child", lambda request: (work(), os._exit(0)))

    return set_work


def test_exit_code_and_output(children):
    children(lambda: (os.write(1, "a 红\r\n".encode() * 50_000), os._exit(7)))
    answer = harness.attend(REQUEST)
    assert (answer["code"], answer["said"]) == (7, "a 红\n" * 50_000)


@pytest.mark.parametrize("speaks", [False, True])
def test_a_child_that_never_ends_is_killed(children, speaks):
    """As when one of two processes waits for the other, which has ended."""

    def wait() -> None:
        for _ in range(6000):
            if speaks:
                os.write(1, b"waiting\n")
            time.sleep(0.1)

    children(wait)
    answer = harness.attend({**REQUEST, "limit": 1})
    assert answer["code"] == -9
    assert answer["said"].endswith("killed after 1 s")
    assert answer["said"].startswith("waiting") == speaks


def test_a_child_whose_own_child_stays_is_not_waited_for(children):
    def leave() -> None:
        if os.fork() == 0:
            time.sleep(5)
            os._exit(0)

    children(leave)
    assert harness.attend({**REQUEST, "limit": 1})["code"] == 0
