#!/usr/bin/env python3
"""What the chat window does when too many questions come at once, and when a page is closed during its
answer.

    .venv/bin/python benchmarks/windows.py [--clicks 200] [--closed 20] [--queue 16] [--model_path demo]

It starts interaction.py as a user does and sends it over plain HTTP what many open pages would send.
First, that many clicks on Send come at the same moment. Then all places are taken and one question waits:
a page is closed during its answer, and the time is measured until the answer to the waiting question
begins. The result is a Markdown table. The exit code is 1 if more questions waited than --queue allows,
or if a click was neither taken nor refused.
"""

import argparse
import contextlib
import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard.system import hardware
from onecard.training import plan

ROOT = Path(__file__).resolve().parent.parent
SHORT, LONG = 16, 1000  # tokens of an answer to many clicks, and of an answer whose page is closed
PATIENCE = 600  # seconds; only a hang takes longer
API = "/gradio_api/"


class Site:
    """An open window at a port, and what its page knows about it."""

    def __init__(self, port: int):
        self.port = port
        config = json.loads(self.request("GET", "/config")[1])
        parts = {part["id"]: part["props"] for part in config["components"]}
        named = {props.get("elem_id"): number for number, props in parts.items()}
        events = config["dependencies"]
        self.begin = next(one for one in events if [named["send"], "click"] in one["targets"])
        chained = [one for one in events if one["trigger_after"] == self.begin["id"]]
        self.work = max(chained, key=lambda one: len(one["inputs"]))
        values = {number: parts[number].get("value") for number in self.work["inputs"]}
        self.values = {number: "" if value is None else value for number, value in values.items()}
        self.length = [named[f"option-{name}"] for name in ("min_new_tokens", "max_new_tokens")]

    def request(self, method: str, path: str, body: dict | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        status, content = answer.status, answer.read()
        connection.close()
        return status, content

    def listen(self, path: str) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        connection.request("GET", f"{API}{path}")
        return connection, connection.getresponse()


class Page:
    """One open page, which asks, listens, and can be closed at any time."""

    def __init__(self, site: Site):
        self.site, self.session = site, uuid.uuid4().hex
        self.alive = site.listen(f"heartbeat/{self.session}")
        self.events: dict[str, float] = {}  # kind of message -> when the first of it came
        self.is_whole = False
        self.waiting = 0  # most questions that the server said were waiting
        self.begun = threading.Event()
        self.stream: tuple[http.client.HTTPConnection, http.client.HTTPResponse] | None = None

    def send(self, event: dict, path: str, values: list) -> tuple[int, bytes]:
        body = {"data": values, "fn_index": event["id"], "session_hash": self.session}
        return self.site.request("POST", f"{API}{path}", body)

    def click(self, tokens: int) -> tuple[int, float]:
        """Send a question; return its status, 503 for a full queue, and the seconds until it was known."""
        site, started = self.site, time.monotonic()
        values = {
            **site.values,
            **dict.fromkeys(site.length, tokens),
            site.work["inputs"][0]: "Tell me a story.",
        }
        self.send(site.begin, "run/predict", [])
        status, content = self.send(site.work, "queue/join", list(values.values()))
        if status not in (200, 503):
            sys.exit(f"error: the window answered {status}: {content[:300]!r}")
        return status, time.monotonic() - started

    def follow(self) -> None:
        """Listen until the answer is complete or the page is closed."""
        self.stream = self.site.listen(f"queue/data?session_hash={self.session}")
        with contextlib.suppress(OSError, ValueError, AttributeError, http.client.HTTPException):
            for line in self.stream[1]:
                message = json.loads(line[6:]) if line.startswith(b"data: ") else {"msg": "none"}
                self.events.setdefault(message["msg"], time.monotonic())
                self.waiting = max(self.waiting, message.get("queue_size") or 0)
                if message["msg"] == "process_starts":
                    self.begun.set()
                if message["msg"] == "process_completed":
                    self.is_whole = message["success"]
                    return

    def followed(self) -> "Page":
        threading.Thread(target=self.follow, daemon=True).start()
        return self

    def close(self) -> None:
        """Do what a browser does when its tab is closed: the connections end without a message."""
        for connection, _ in filter(None, (self.alive, self.stream)):
            with contextlib.suppress(OSError):
                connection.sock.shutdown(2)
            connection.close()


@contextlib.contextmanager
def window(model_path: str, queue: int, device: str) -> Iterator[Site]:
    """Run interaction.py in a process of its own."""
    options = [f"--model_path={model_path}", f"--queue={queue}", f"--device={device}", "--mode=greedy"]
    options += [f"--min_new_tokens={LONG}", f"--max_new_tokens={LONG}"]
    command = [sys.executable, str(ROOT / "interaction.py"), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        address = next(
            filter(None, (re.search(r"http://127\.0\.0\.1:(\d+)", line) for line in process.stdout)), None
        )
        if address is None:
            sys.exit("error: interaction.py did not open a window; the reason is above.")
        yield Site(int(address[1]))
    finally:
        process.kill()
        process.wait()


def flood(site: Site, clicks: int) -> dict[str, float]:
    """Let this many pages click at the same moment, and wait for the answers to the accepted questions."""
    together = threading.Barrier(clicks)
    with ThreadPoolExecutor(clicks) as pool:
        pages = list(pool.map(lambda _: Page(site), range(clicks)))

        def click(page: Page) -> tuple[int, float, float]:
            together.wait()
            started = time.monotonic()
            status, seconds_to_know = page.click(SHORT)
            if status == 200:
                page.follow()
            return status, seconds_to_know, page.events.get("process_completed", started) - started

        results = list(pool.map(click, pages))
    for page in pages:
        page.close()
    whole = [seconds for status, _, seconds in results if status == 200]
    return {
        "taken": len(whole),
        "answered": sum(page.is_whole for page in pages),
        "refused": sum(status == 503 for status, _, _ in results),
        "waiting": max(page.waiting for page in pages),
        "told": share(95, [seconds for _, seconds, _ in results]),
        "whole": share(95, whole),
    }


def closed(site: Site, count: int) -> list[float]:
    """Measure the seconds from closing a page during its answer to the start of the next answer."""
    answered = []
    while True:  # stops when all places are occupied
        waiting = Page(site)
        waiting.click(LONG)
        waiting.followed()
        if not waiting.begun.wait(5):
            break
        answered.append(waiting)
        still_growing(answered)
    gaps = []
    for _ in range(count):
        closed_page = answered.pop(0)
        started = time.monotonic()
        closed_page.close()
        waiting.begun.wait(PATIENCE)
        still_growing(answered)
        gaps.append(waiting.events["process_starts"] - started)
        answered.append(waiting)
        waiting = Page(site)
        waiting.click(LONG)
        waiting.followed()
        time.sleep(1)  # so that each is answered for a while
    for page in (*answered, waiting):
        page.close()
    return gaps


def still_growing(pages: list[Page]) -> None:
    """Exit unless the answers of all these pages are still growing."""
    if any("process_completed" in page.events for page in pages):
        sys.exit("error: an answer ended by itself, so nothing was measured. Choose a slower model.")


def share(percent: int, values: list[float]) -> float:
    """The value that this many percent of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--clicks", type=int, default=200, help="clicks on Send at the same moment")
    parser.add_argument("--closed", type=int, default=20, help="pages that are closed during their answers")
    parser.add_argument("--queue", type=int, default=16, help="questions that may wait")
    parser.add_argument("--model_path", default="demo")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    versions = {**plan.versions(), "gradio": version("gradio")}
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    with window(args.model_path, args.queue, args.device) as site:
        seen, gaps = flood(site, args.clicks), closed(site, args.closed)
    fine = seen["waiting"] <= args.queue and seen["taken"] + seen["refused"] == args.clicks
    fine = fine and seen["answered"] == seen["taken"]
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}; {named}. Model: {args.model_path}.\n")
    print("| | |\n|---|---:|")
    for title, value in (
        ("clicks on Send in the same moment", args.clicks),
        (f"answered, {SHORT} tokens each", f"{seen['answered']} of {seen['taken']} taken"),
        ("told that too many wait", seen["refused"]),
        (f"most questions waiting (--queue {args.queue})", seen["waiting"]),
        ("a click knows whether it was taken, 95 % within", f"{seen['told']:.2f} s"),
        ("those taken have their whole answer, 95 % within", f"{seen['whole']:.1f} s"),
        ("pages closed while they were answered", len(gaps)),
        ("their place is another's, median", f"{statistics.median(gaps):.2f} s"),
        ("95 % within", f"{share(95, gaps):.2f} s"),
        ("longest", f"{max(gaps):.2f} s"),
    ):
        print(f"| {title} | {value} |")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
