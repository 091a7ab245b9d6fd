"""Messages have a line of their own, come at once from the main process only, and never end a run."""

import importlib
import io
import os
import re
import subprocess
import sys

import pytest
from tqdm import tqdm

from onecard.__main__ import PROGRAMS, start
from onecard.system import commands, console
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


ALL_LETTERS = "Größe 漢字 😀 \udcff"
ENCODINGS = ["gbk", "latin-1", "ascii", "cp1252", "utf-8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", PROGRAMS)
def test_every_program_can_say_every_letter(monkeypatch, command, encoding):
    """What the output's encoding lacks is escaped, on both streams, and every other letter is as it was."""
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
        for name in ("stdout", "stderr")
    }

    def program(_: list[str]) -> None:
        console.say(ALL_LETTERS)
        print(ALL_LETTERS, file=sys.stderr)

    module = importlib.import_module(f"onecard.programs.{PROGRAMS[command][0]}")
    monkeypatch.setattr(module, "main", program)
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as end:
        start(command, [])
    assert end.value.code == 0
    expected = f"{ALL_LETTERS}\n".encode(encoding, "backslashreplace")
    assert {stream.buffer.getvalue() for stream in streams.values()} == {expected}


@pytest.mark.parametrize("encoding", ["gbk", "latin-1"])
def test_a_real_program_in_another_encoding(tmp_path, encoding):
    """It says which file it wrote, and ends well; its rows are written as UTF-8 all the same."""
    source, target = tmp_path / "rows.jsonl", tmp_path / "漢字 😀.parquet"
    source.write_text('{"instruction": "漢字 😀", "output": "é"}\n', encoding="utf-8")
    command = [*commands.child("json-to-parquet")[0], f"--data_path={source}", f"--output_path={target}"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert target.name.encode(encoding, "backslashreplace") in ended.stdout
    from pyarrow import parquet

    assert parquet.read_table(target).to_pylist() == [{"instruction": "漢字 😀", "output": "é"}]


def test_the_output_of_children_is_read_as_utf8():
    """Whatever encoding the user's terminal has. Of files ruff's rule PLW1514 sees to it."""
    for path in (ROOT / "onecard").rglob("*.py"):
        assert not re.search("text=True|universal_newlines", path.read_text(encoding="utf-8")), path
