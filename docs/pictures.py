#!/usr/bin/env python3
"""Take the screenshots of the windows that docs/chat.md shows, in a headless Chromium.

    bash finetune.sh && bash tools/setup.sh test
    .venv/bin/python docs/pictures.py [FOLDER]

They show the adapter that finetune.sh trained; the training window trains a short run beside it in a
temporary folder. This takes about five minutes on two cores. Look at the screenshots before you commit
them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = ROOT / "lora-checkpoints/demo"
QUESTIONS = "How can I keep bread fresh for longer?", "And apples?"
LONG = 900_000  # milliseconds; only a hang takes as long
# in each place the newest answer has a part that may still change
GROWING = """places => places.every(place => {
  const parts = document.querySelectorAll(place + ' .may-change');
  return parts.length && parts[parts.length - 1].textContent.trim().length > 12;
})"""


@contextmanager
def program(*command: str, folder: Path = ROOT) -> Iterator[str]:
    """Start a program of ours and yield its address; the program ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [sys.executable, str(ROOT / command[0]), *command[1:], f"--server_port={port}"]
    running = subprocess.Popen(
        arguments, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8", env=dict(os.environ)
    )
    try:
        for line in running.stdout:
            if "http://" in line:
                break
        yield f"http://127.0.0.1:{port}/"
    finally:
        running.send_signal(signal.SIGINT)
        running.wait(60)


def opened(browser: Browser, address: str, height: int) -> Page:
    page = browser.new_page(viewport={"width": 1280, "height": height})
    page.set_default_timeout(LONG)
    page.goto(address)
    return page


def one_answer(browser: Browser, to: Path) -> None:
    """Four growing beams, all of them opened."""
    with program("generate.py", "--lora_path", str(ADAPTER), "--mode", "beam") as address:
        page = opened(browser, address, 860)
        page.fill("#instruction textarea", QUESTIONS[0])
        page.click("#beams-box button")
        page.click("#send")
        page.wait_for_function(GROWING, arg=["#output"])
        page.screenshot(path=to / "generate.png")


def chat(browser: Browser, to: Path) -> None:
    """Adapter and base side by side, in the middle of the second answer."""
    with program("interaction.py", "--lora_path", str(ADAPTER), "--mode", "beam", "--studio") as address:
        page = opened(browser, address, 860)
        page.check("#compare input")
        for number, question in enumerate(QUESTIONS):
            page.fill("#box textarea", question)
            page.press("#box textarea", "Enter")
            if number == 0:
                page.wait_for_selector("#stop:visible")
                page.wait_for_selector("#stop", state="hidden")
        page.wait_for_function(GROWING, arg=["#left", "#right"])
        page.screenshot(path=to / "chat.png")


def training(browser: Browser, to: Path) -> None:
    """A run beside an earlier one, the rows that it learns, and its answers to the fixed prompts."""
    with tempfile.TemporaryDirectory(prefix="onecard-pictures-") as place:
        folder = Path(place)
        (folder / "sample").mkdir()
        shutil.copy(ROOT / "sample/instruct.json", folder / "sample")
        shutil.copytree(ADAPTER, folder / "lora-checkpoints" / ADAPTER.name)
        with program("interaction.py", "--model_path", "demo", "--studio", folder=folder) as address:
            page = opened(browser, address, 1060)
            page.get_by_role("tab", name="Training").click()
            fields = {"learning_rate": "1e-3", "num_epochs": 1, "batch_size": 16, "eval_steps": 3}
            fields |= {"data_path": "sample/instruct.json", "sample_steps": 4, "name": "rate-1e-3"}
            for field, value in fields.items():
                field_of(page, field).fill(str(value))
            page.click("#train-start")
            page.get_by_text("rate-1e-3 has started.").wait_for()
            # until then the page still shows the earlier run, which is finished
            page.locator("[data-testid=state]", has_text="rate-1e-3").wait_for()
            page.click("#train-others input")
            page.get_by_role("option", name="demo").click()
            page.keyboard.press("Escape")
            page.click("#train-preview")
            page.locator("#train-rows .oc-row mark").first.wait_for()
            page.wait_for_function(
                "() => +document.querySelector('[data-testid=state]').dataset.step >= 10", timeout=LONG
            )
            page.evaluate("scrollTo(0, 0)")
            page.screenshot(path=to / "studio.png")
            page.locator("[data-testid=state][data-kind=finished]").wait_for()
            page.locator("#train-answers").get_by_text("After step").first.wait_for()
            page.locator("#train-step").scroll_into_view_if_needed()
            box = page.locator("#train-answers").bounding_box()
            page.screenshot(path=to / "studio-samples.png", clip={**box, "height": min(box["height"], 640)})


def field_of(page: Page, name: str):
    field = page.locator(f"#train-{name} :is(input, textarea)").first
    if not field.is_visible():
        page.get_by_text("All options").click()
    return field


def main() -> None:
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    if not (ADAPTER / "finished.json").exists():
        sys.exit("error: there is no trained adapter to show. First: bash finetune.sh")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        for take in (one_answer, chat, training):
            take(browser, to)
        browser.close()


if __name__ == "__main__":
    main()
