"""The training window in a browser: its page, the processes that serve it, and the end of its trainings."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from playwright.sync_api import Page

from onecard.runs import jobs
from tests.support.paths import ROOT

WINDOW = """
import sys
from pathlib import Path
from onecard.config.chat import ChatConfig
from onecard.ui import page, training_window
page.launch(training_window.build_page(), ChatConfig(server_port=int(sys.argv[1])))
"""
Begin = Callable[[], tuple[subprocess.Popen, str]]


def eventually(check: Callable[[], bool], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, check
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def kill_trainings(workspace: Path) -> None:
    for name in jobs.names(workspace):
        pid = jobs.state(workspace, name).pid
        if pid:
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def windows(folder: Path) -> Iterator[Begin]:
    """A function that opens a training window in a process of its own, and returns process and address.

    folder: its working directory. At the end, all processes and trainings that still run are killed.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    opened = []

    def begin() -> tuple[subprocess.Popen, str]:
        port = free_port()
        command = [sys.executable, "-c", WINDOW, str(port)]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        opened.append(process)
        assert "Open" in process.stdout.readline()
        return process, f"http://127.0.0.1:{port}/"

    try:
        yield begin
    finally:
        kill_trainings(folder / "lora-checkpoints")
        for process in opened:
            process.kill()
            process.wait()


class TrainingPage:
    """The actions of a user on the training window."""

    def __init__(self, page: Page):
        self.page = page
        self.page.set_default_timeout(90_000)

    def fill(self, **values) -> None:
        for name, value in values.items():
            self.page.fill(f"#train-{name} :is(input, textarea)", str(value))

    def choose(self, **values) -> None:
        for name, value in values.items():
            box = self.page.locator(f"#train-{name}")
            box.locator("input").click()
            box.get_by_role("option", name=value, exact=True).click()

    def press(self, name: str) -> None:
        self.page.click(f"#train-{name}")

    def wait(self, kind: str, step: int = 0) -> int:
        """Wait until the run is in this state and has done `step` steps; returns how many it has done."""
        state = self.page.locator(f"[data-testid=state][data-kind={kind}]")
        state.wait_for()
        eventually(lambda: int(state.get_attribute("data-step")) >= step, 90)
        return int(state.get_attribute("data-step"))


@contextlib.contextmanager
def visited(browser, url: str) -> Iterator[TrainingPage]:
    """The window in a new page. A request to another address fails the test."""
    page, elsewhere = browser.new_page(), []

    def note(request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            elsewhere.append(request.url)

    page.on("request", note)
    page.goto(url)
    try:
        yield TrainingPage(page)
    finally:
        page.close()
    assert elsewhere == [], "the window sent a request to another address"
