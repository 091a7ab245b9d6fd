"""A chat window in a process of its own (window_server.py), and the actions of a person on its page."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page

from tests.support.paths import ROOT

MESSAGES = "#left [data-testid=user], #left [data-testid=bot]"

ASKED = """before => document.querySelectorAll('#left [data-testid=user]').length > before
  || document.querySelector('#status [role=alert]')"""

WAIT = 60_000  # milliseconds; only a hang takes longer


class Server:
    """The process of a window. The constructor returns when its port answers."""

    def __init__(self, kind: str, folder: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.address = folder, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "tests.support.window_server", kind, str(folder)]
        command += [f"--server_port={port}", *options]
        self.log = open(folder / "log", "w+", encoding="utf-8")  # noqa: SIM115 (closed with the process)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log)
        self.port = port
        until = time.monotonic() + 180
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.1)
        raise AssertionError((folder / "log").read_text(encoding="utf-8"))

    def tokens(self) -> int:
        """The number of tokens that the model has generated so far for all pages together."""
        path = self.folder / "tokens"
        return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
        self.log.close()


@contextlib.contextmanager
def serving(kind: str, folder: Path, *options: str) -> Iterator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(kind, folder, *options)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def opened(browser: Browser, server: Server, ready: str, **context) -> Iterator[Page]:
    """A page in a browser profile of its own. A request to another address fails the test."""
    profile = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
    requested: list[str] = []
    page = profile.new_page()
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: requested.append(request.url))
    page.goto(server.address)
    page.wait_for_selector(ready)
    page.wait_for_timeout(300)
    try:
        yield page
    finally:
        profile.close()
    outside = [
        url
        for url in requested
        if not re.match(rf"(https?|ws)://127\.0\.0\.1:{server.port}|data:|blob:", url)
    ]
    assert outside == [], "the window sent a request to another address"


def finished(page: Page) -> None:
    """Wait until the answer is complete and the button Send is back."""
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector("#send:visible")


def ask(page: Page, question: str) -> None:
    """Send a question, and wait until the page shows it or refuses it; the answer may be there as well."""
    before = page.locator("#left [data-testid=user]").count()
    page.fill("#box textarea", question)
    page.press("#box textarea", "Enter")
    page.wait_for_function(ASKED, arg=before)


def bubbles(page: Page, side: str = "left") -> list[str]:
    """The questions and answers on the page, in their order."""
    texts = page.locator(MESSAGES.replace("left", side)).all_inner_texts()
    return [text.strip() for text in texts]


def status(page: Page) -> str:
    return page.inner_text("#status")


def set_slider(page: Page, name: str, value: str) -> None:
    box = page.locator(f"#option-{name} input[type=number]")
    box.fill(value)
    box.press("Tab")
