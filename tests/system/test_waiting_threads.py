"""Every program lets waiting threads sleep soon before anything can import torch; what a user sets stays."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onecard.__main__ import PROGRAMS
from onecard.system import commands, sandbox, waiting_threads
from onecard.system.waiting_threads import OURS, SPINS, USERS
from tests.support.paths import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py")])
LIBRARY = Path(torch.__file__).parent / "lib" / "libgomp.so.1"  # the OpenMP that torch brings on Linux


class ProgramImportedError(Exception):
    """The file of a program, which may import torch, was about to be imported."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process that has not imported torch, started by a user who has set nothing."""
    monkeypatch.delitem(sys.modules, "torch")
    for name in USERS:
        monkeypatch.setenv(name, "")  # so that it is taken back, whatever the test does
        monkeypatch.delenv(name)
    waiting_threads._say.cache_clear()


@pytest.fixture
def stop_at_program(monkeypatch) -> None:
    import_module = importlib.import_module

    def stop(name: str, *arguments: object) -> object:
        if name.startswith("onecard.programs."):
            raise ProgramImportedError
        return import_module(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", stop)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_file_that_users_start_sets_it_first(file, stop_at_program):
    with pytest.raises(ProgramImportedError):
        runpy.run_path(str(file), run_name="__main__")
    assert os.environ[SPINS] == OURS


@pytest.mark.parametrize("command", PROGRAMS)
def test_every_sub_command_sets_it_first(command, stop_at_program, monkeypatch):
    """They are also how the training window starts its trainings."""
    monkeypatch.setattr(sys, "argv", ["onecard", command])
    with pytest.raises(ProgramImportedError):
        runpy.run_path(str(ROOT / "onecard" / "__main__.py"), run_name="__main__")
    assert os.environ[SPINS] == OURS


@pytest.mark.parametrize("name", USERS)
def test_what_the_user_sets_stays(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "2")
    waiting_threads.choose()
    assert {each: os.environ[each] for each in USERS if each in os.environ} == {name: "2"}
    waiting_threads.say_once("cpu")
    assert capsys.readouterr().out == ""


def test_it_is_not_set_when_torch_has_read_its_settings_already(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", torch)
    waiting_threads.choose()
    waiting_threads.say_once("cpu")
    assert SPINS not in os.environ
    assert capsys.readouterr().out == ""


def test_it_is_said_once_and_where_it_matters(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    waiting_threads.choose()
    waiting_threads.say_once("cuda:0")
    assert capsys.readouterr().out == ""
    for _ in range(2):
        waiting_threads.say_once("cpu")
    assert capsys.readouterr().out.count(f"{SPINS}={OURS}") == 1


def test_one_core_has_no_threads_that_wait(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    waiting_threads.choose()
    waiting_threads.say_once("cpu")
    assert capsys.readouterr().out == ""


def test_children_have_it_too(monkeypatch, capsys):
    """A child that is a program says it in its own output; a reader of files has no such line."""
    waiting_threads.choose()
    assert sandbox.environment()[SPINS] == OURS
    assert commands.child("finetune")[1][SPINS] == OURS
    waiting_threads.choose()  # as the child does
    assert waiting_threads.is_ours()


def test_children_have_what_the_user_sets(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    waiting_threads.choose()
    assert sandbox.environment()["OMP_WAIT_POLICY"] == "ACTIVE"
    assert SPINS not in {**sandbox.environment(), **commands.child("finetune")[1]}


@pytest.mark.skipif(not LIBRARY.is_file(), reason="this build of torch brings no GNU OpenMP")
def test_the_library_of_torch_reads_it():
    """A library that is loaded after choose() shows the value among its settings."""
    load = f"import ctypes; ctypes.CDLL({str(LIBRARY)!r})"
    program = f"from onecard.system import waiting_threads; waiting_threads.choose(); {load}"
    variables = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert f"{SPINS} = '{OURS}'" in ended.stderr, ended.stderr
