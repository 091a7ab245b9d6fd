"""The benchmark programs run unchanged on something small and print complete tables. No figure is judged."""

import subprocess
import sys

import pytest

from benchmarks import busy_machine
from onecard.__main__ import PROGRAMS
from tests.support.paths import ROOT

ENGINE = ["engine", "--pairs", "1", "--tokens", "4", "--types", "f16"]
WEIGHTS = ["weights", "--layers", "1", "--width", "256", "--repeats", "1"]


def cells(*arguments: str, program: str = "tools.py") -> list[list[str]]:
    """The rows of the table that a program of benchmarks/ prints, without its head."""
    command = [sys.executable, ROOT / "benchmarks" / program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    rows = [line.strip("|").split("|") for line in ended.stdout.splitlines() if line.startswith("|")]
    assert len({len(row) for row in rows}) == 1
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.slow
def test_the_engine_writes_what_llama_writes():
    """This holds with an adapter and without one."""
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu"
    )
    rows = cells(*ENGINE)
    assert [row[-1] for row in rows] == ["yes", "yes"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:4])


@pytest.mark.slow
def test_converting_and_merging_are_measured(tmp_path):
    """Each tool has its row, and no file is left behind."""
    rows = cells(*WEIGHTS[:1], str(tmp_path), *WEIGHTS[1:])
    assert [row[0].split()[0] for row in rows] == ["original", "transformers", "merge,"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_busy_machine_is_measured():
    """Every kind of work has a row for each side, with all its figures."""
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is an extra of its own: bash tools/setup.sh cpu"
    )
    rows = cells("--rounds", "1", program="busy_machine.py")
    works, sides = busy_machine.WORK, (busy_machine.LIBRARIES, busy_machine.OURS)
    assert [row[:2] for row in rows] == [[work, side] for work in works for side in sides]
    assert all(float(cell) > 0 for row in rows for cell in row[2:4])


def test_the_start_of_every_sub_command_is_measured():
    rows = cells("--times", "1", program="start_time.py")
    assert [row[0] for row in rows] == [f"`onecard {name} --help`" for name in PROGRAMS]
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[1:])
