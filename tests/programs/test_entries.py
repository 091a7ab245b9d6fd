"""The programs as a user starts them: real processes, used in a real browser and ended by a signal.

What the windows can do is tested in test_windows.py and test_studio.py; here it is the way from a command to
a page, and back.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from onecard.config import options as config_options
from onecard.config import training as config_training
from onecard.runs import jobs
from onecard.runs import log as runs_log
from onecard.training import loop, metrics
from tests.support import tiny
from tests.support.browser import ask, finished, opened, serving, set_slider
from tests.support.paths import ROOT
from tests.support.training_page import TrainingPage, eventually, kill_trainings

LENGTH = 150  # tokens of an answer: enough to be seen growing
ANSWER = ["--mode=greedy", f"--min_new_tokens={LENGTH}", f"--max_new_tokens={LENGTH}", "--device=cpu"]
GROWING = """place => {  // notes every length of the answer that is shown
  window.lengths = [];
  new MutationObserver(() => {
    const shown = [...document.querySelectorAll(place)].at(-1);
    const length = shown ? shown.innerText.length : 0;
    if (length && window.lengths.at(-1) !== length) window.lengths.push(length);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


class Program:
    """A program in a session of its own, as in a terminal; it is ready once it has printed its address."""

    def __init__(self, command: list[str], folder: Path, log: Path, **variables: str):
        hidden = ("HF_HUB_OFFLINE", "BASE_MODEL", "MODEL_PATH", "LORA_PATH", "USE_LOCAL")
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        with log.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, "OMP_NUM_THREADS": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.log = log
        eventually(lambda: self.process.poll() is not None or "Ctrl-C to end." in self.said(), 180)
        match = re.search(r"Open (http://127\.0\.0\.1:(\d+))/ in a browser", self.said())
        assert match, self.said()
        self.address, self.port = match[1], int(match[2])

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def environment(self) -> dict[str, str]:
        """The environment of the process, as the kernel keeps it."""
        lines = Path(f"/proc/{self.process.pid}/environ").read_text(encoding="utf-8").split("\0")
        return dict(line.split("=", 1) for line in lines if line)

    def end(self, number: int) -> int:
        """Send a signal to the group, as Ctrl-C does, and return the exit code; no process may be left."""
        os.killpg(self.process.pid, number)
        code = self.process.wait(timeout=60)
        eventually(lambda: not self.group())
        return code

    def group(self) -> list[str]:
        """The processes of the group that still run; zombies do not count."""
        stats = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                stats.append(path.read_text(encoding="utf-8").rpartition(")"))
        processes = {before: after.split() for before, _, after in stats}
        return [
            name
            for name, (state, _, group, *_) in processes.items()
            if state != "Z" and int(group) == self.process.pid
        ]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def started(command: list[str], folder: Path, log: Path, **variables: str) -> Iterator[Program]:
    """A program that has printed its address; if it still runs at the end, it is killed."""
    program = Program(command, folder, log, **variables)
    try:
        yield program
    finally:
        program.kill()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model) -> Path:
    """A run of a few steps, as finetune.py writes it."""
    folder = tmp_path_factory.mktemp("runs")
    flags = {"model_path": tiny_model, "data_path": tiny.save_rows(folder / "rows.json", 8), "device": "cpu"}
    flags |= {"output_path": folder / "mine", "bits": 16, "dtype": "fp32", "max_steps": 1, "test_size": 0}
    options = config_options.build(
        config_training.FinetuneConfig, {name: str(value) for name, value in flags.items()}
    )
    loop.run(options, sample=None, draw=metrics.loss_curve)
    return folder / "mine"


def answered(page: Page, single: bool) -> None:
    """Type and send a question; the answer grows on the page until it is complete."""
    page.evaluate(GROWING, "#output .answer" if single else "#left [data-testid=bot]")
    if single:
        page.fill("#instruction textarea", "Say red")
        page.click("#send")
        page.wait_for_function("document.querySelector('#output .answer').innerText.length > 0")
    else:
        ask(page, "Say red")
    expect(page.locator("#status")).to_contain_text(re.compile(r"tokens/s.*ended at the limit of new tokens"))
    finished(page)
    lengths = page.evaluate("window.lengths")
    assert len(lengths) >= 3, "it came at once"
    assert lengths == sorted(lengths)


# program, its arguments, its variables, the adapters its picker offers, the signal that ends it
ENTRIES = {
    "generate.py": (["--lora_path=RUN"], {}, ["mine"], signal.SIGINT),
    "interaction.py": (["--model_path=MODEL"], {}, [], signal.SIGTERM),
    "generate.sh": (
        [],
        {"BASE_MODEL": "MODEL", "LORA_PATH": "RUN", "USE_LOCAL": "1"},
        ["mine"],
        signal.SIGTERM,
    ),
    "interaction.sh": ([], {"LORA_PATH": "RUN"}, ["mine"], signal.SIGINT),
    "alpaca-serve.sh": (["--lang=en"], {"BASE_MODEL": "MODEL", "USE_LOCAL": "1"}, [], signal.SIGTERM),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_program_opens_its_page_answers_and_ends(browser, copy, run, tiny_model, tmp_path, name):
    """The command opens a page that streams an answer, and one signal ends every process."""
    arguments, variables, adapters, number = ENTRIES[name]

    def named(text: str) -> str:
        return text.replace("MODEL", str(tiny_model)).replace("RUN", str(run))

    interpreter = ["bash"] if name.endswith(".sh") else [str(copy / ".venv" / "bin" / "python")]
    command = [*interpreter, name, *map(named, arguments), *ANSWER]
    environment = {variable: named(value) for variable, value in variables.items()}
    single = name.startswith("generate")
    with started(command, copy, tmp_path / "log", **environment) as program:
        assert (program.environment().get("HF_HUB_OFFLINE") == "1") == ("USE_LOCAL" in variables)
        with opened(browser, program, "#instruction textarea" if single else "#box textarea") as page:
            picker = page.locator("#adapter input")
            expect(picker).to_have_value(adapters[0] if adapters else "base")
            answered(page, single)
        code = program.end(number)
        assert code == (0 if number == signal.SIGINT else -number), program.said()
        assert "Traceback" not in program.said()
        assert "Setting up" not in program.said()


def test_ctrl_c_in_the_middle_of_an_answer_ends_the_program(browser, tmp_path):
    """It ends before the answer is complete, without an abort, although the page stays open."""
    with (
        serving("turns", tmp_path / "server", "--mode=greedy", "--min_new_tokens=450") as server,
        opened(browser, server, "#box textarea") as page,
    ):
        set_slider(page, "max_new_tokens", "450")
        ask(page, "Say everything")
        eventually(lambda: server.tokens() > 5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 0
        assert server.tokens() < 300, "the answer went on to its end"


def test_the_studio_trains_and_chats(browser, tiny_model, tmp_path):
    """interaction.py --studio trains in one tab and answers a question in the other.

    Ctrl-C ends the window and not the training, which the next window shows and stops.
    """
    shutil.copytree(tiny_model, tmp_path / "tiny")
    tiny.save_rows(tmp_path / "rows.json", 24)
    command = [sys.executable, str(ROOT / "interaction.py"), "--studio", "--model_path=tiny", *ANSWER]
    with contextlib.ExitStack() as stack:
        stack.callback(kill_trainings, tmp_path / "lora-checkpoints")
        program = stack.enter_context(started(command, tmp_path, tmp_path / "log"))
        with opened(browser, program, "#box textarea") as page:
            training = TrainingPage(page)
            page.get_by_role("tab", name="Training").click()
            page.get_by_text("All options").click()
            training.choose(bits="16", dtype="fp32")
            training.fill(data_path="rows.json", model_path="tiny", device="cpu", test_size=2, name="mine")
            training.fill(batch_size=4, num_epochs=500, sample_steps=0)
            training.press("start")
            training.wait("running", 1)
            expect(page.locator("#train-plots polyline").first).to_be_visible()
            page.get_by_role("tab", name="Chat").click()
            answered(page, single=False)
            folder = tmp_path / "lora-checkpoints" / "mine"
        seen = runs_log.last_step(folder)
        assert program.end(signal.SIGINT) == 0, program.said()
        eventually(lambda: runs_log.last_step(folder) > seen)
        again = stack.enter_context(started(command, tmp_path, tmp_path / "log2"))
        with opened(browser, again, "#box textarea") as page:
            training = TrainingPage(page)
            page.get_by_role("tab", name="Training").click()
            training.wait("running", seen + 1)
            training.press("stop")
            saved = training.wait("stopped", seen + 1)
            assert (folder / f"checkpoint-{saved}").is_dir()
            assert not jobs.state(folder.parent, "mine").going
        assert again.end(signal.SIGTERM) == -signal.SIGTERM
