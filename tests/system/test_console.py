"""Messages have a line of their own, come at once from the main process only, and never end a run."""

import subprocess
import sys

import pytest
from tqdm import tqdm

from onecard.system import console
from tests.support import tiny
from tests.support.paths import ROOT


def child(code: str, **settings) -> subprocess.Popen:
    program = f"import os, sys\nfrom onecard.system.console import say\n{code}"
    return subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, text=True, **settings)


def test_lines_stand_above_an_open_bar(monkeypatch):
    """As in a terminal: nothing of the bar stays before the text, and the bar is drawn again."""
    screen = tiny.Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=3, desc="working") as bar:
        bar.update()
        console.say("a line")
        output = screen.getvalue()
    before, after = output.split("a line")
    assert "working" in before
    assert before.rpartition("\r")[2] == ""
    assert after.startswith("\n")
    assert "working" in after


def test_it_comes_at_once():
    """This holds for a pipe too, and when the process is killed directly afterwards."""
    assert child("say('one')\nos._exit(9)", stdout=subprocess.PIPE).communicate()[0] == "one\n"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_main_process_speaks(capsys, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    console.say("one")
    assert capsys.readouterr().out == ("one\n" if rank == "0" else "")


def test_work_goes_on_unheard():
    """When the reader of the pipe has ended, messages are lost, and the process ends normally."""
    code = "sys.stdin.read()\nfor number in range(3):\n    say('x' * 100000)\nsys.exit(number)"
    running = child(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.close()
    running.stdin.close()
    assert (running.stderr.read(), running.wait(60)) == ("", 2)
    running.stderr.close()


def test_a_bar_of_bytes_is_for_terminals(capsys, monkeypatch):
    with console.over_bytes("copying") as progress:
        progress(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", tiny.Screen())
    with console.over_bytes("copying") as progress:
        progress(1000, 2000)
        progress(2000, 2000)
    assert "copying: 100%" in sys.stderr.getvalue()
