"""Every program sets how OpenMP computes before anything can import torch; what a user sets stays."""

import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onecard.__main__ import PROGRAMS
from onecard.system import commands, hardware, openmp, sandbox
from onecard.system.openmp import OURS, SPINS, USERS
from tests.support.paths import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "tools").glob("*.py"), *(ROOT / "serve").glob("*.py")])
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
    openmp._say.cache_clear()


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
    openmp.choose()
    assert {each: os.environ[each] for each in USERS if each in os.environ} == {name: "2"}
    openmp.say_once("cpu")
    assert capsys.readouterr().out == ""


def test_it_is_not_set_when_torch_has_read_its_settings_already(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", torch)
    openmp.choose()
    openmp.say_once("cpu")
    assert SPINS not in os.environ
    assert capsys.readouterr().out == ""


def test_it_is_said_once_and_where_it_matters(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    openmp.choose()
    openmp.say_once("cuda:0")
    assert capsys.readouterr().out == ""
    for _ in range(2):
        openmp.say_once("cpu")
    assert capsys.readouterr().out.count(f"{SPINS}={OURS}") == 1


def test_one_core_has_no_threads_that_wait(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    openmp.choose()
    openmp.say_once("cpu")
    assert capsys.readouterr().out == ""


def test_children_have_it_too(monkeypatch, capsys):
    """A child that is a program says it in its own output; a reader of files has no such line."""
    openmp.choose()
    assert sandbox.environment()[SPINS] == OURS
    assert commands.child("finetune")[1][SPINS] == OURS
    openmp.choose()  # as the child does
    assert openmp.is_ours()


def test_children_have_what_the_user_sets(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    openmp.choose()
    assert sandbox.environment()["OMP_WAIT_POLICY"] == "ACTIVE"
    assert SPINS not in {**sandbox.environment(), **commands.child("finetune")[1]}


@pytest.mark.skipif(not LIBRARY.is_file(), reason="this build of torch brings no GNU OpenMP")
def test_the_library_of_torch_reads_it():
    """A library that is loaded after choose() shows the value among its settings."""
    load = f"import ctypes; ctypes.CDLL({str(LIBRARY)!r})"
    program = f"from onecard.system import openmp; openmp.choose(); {load}"
    variables = {**os.environ, "OMP_DISPLAY_ENV": "VERBOSE"}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert f"{SPINS} = '{OURS}'" in ended.stderr, ended.stderr


@pytest.fixture
def container(tmp_path, monkeypatch):
    """container(**files) is a machine of 64 cores whose control groups have these files."""

    def make(groups: str, files: dict[str, str]) -> None:
        monkeypatch.setattr(openmp, "SYSTEM", tmp_path)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
        for name, text in {"proc/self/cgroup": groups, **files}.items():
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")

    return make


NEW, OLD = "sys/fs/cgroup/", "sys/fs/cgroup/cpu,cpuacct/"
OLD_GROUPS = "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n"


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {f"{NEW}cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {f"{NEW}cpu.max": "250000 100000\n"}, 3),
        ("0::/\n", {f"{NEW}cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {f"{NEW}a/cpu.max": "400000 100000\n", f"{NEW}a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/a/b\n", {f"{NEW}a/cpu.max": "400000 100000\n", f"{NEW}a/b/cpu.max": "50000 100000\n"}, 1),
        ("0::/not/visible\n", {f"{NEW}cpu.max": "300000 100000\n"}, 3),
        (OLD_GROUPS, {f"{OLD}cpu.cfs_quota_us": "200000\n", f"{OLD}cpu.cfs_period_us": "100000\n"}, 2),
        (OLD_GROUPS, {f"{OLD}cpu.cfs_quota_us": "-1\n", f"{OLD}cpu.cfs_period_us": "100000\n"}, None),
        ("", {}, None),
    ],
)
def test_a_container_has_as_many_threads_as_cores(groups, files, cores, container, capsys):
    container(groups, files)
    assert openmp.container_cores() == cores
    openmp.choose()
    expected = {SPINS: OURS} if cores is None else {SPINS: OURS, openmp.THREADS: str(cores)}
    assert {name: os.environ[name] for name in USERS if name in os.environ} == expected
    openmp.say_once("cpu")
    said = capsys.readouterr().out
    assert (SPINS in said) is (cores != 1)
    assert (f"cores       {cores}, because this container" in said) is (cores is not None)
    if cores:
        assert hardware.choose_threads(None) == hardware.Choice(cores, "this container has no more cores")
    openmp.choose()  # as a child does
    assert openmp.is_ours()


def test_a_limit_above_the_cores_is_no_limit(container):
    container("0::/\n", {f"{NEW}cpu.max": "6400000 100000\n"})
    openmp.choose()
    assert openmp.THREADS not in os.environ


@pytest.mark.parametrize(("limit", "threads"), [(600_000, 4), (400_000, 4), (300_000, 3)])
def test_two_hardware_threads_of_a_core_are_one(limit, threads, container, monkeypatch, capsys):
    """A limit of 6 on 4 cores with 8 hardware threads gives no more threads than there are cores."""
    topology = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    pairs = {topology.format(number): f"{number % 4},{number % 4 + 4}\n" for number in range(8)}
    container("0::/\n", {f"{NEW}cpu.max": f"{limit} 100000\n", **pairs})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    openmp.choose()
    choice = hardware.choose_threads(None)
    openmp.say_once("cpu")
    limited = threads < 4
    reason = "this container has no more cores" if limited else "4 physical cores, 8 with hyper-threading"
    assert choice == hardware.Choice(threads, reason)
    assert (openmp.THREADS in os.environ) is limited
    assert ("because this container has no more" in capsys.readouterr().out) is limited


def test_in_a_container_too_what_the_user_sets_stays(container, monkeypatch):
    container("0::/\n", {f"{NEW}cpu.max": "200000 100000\n"})
    monkeypatch.setenv(openmp.THREADS, "5")
    openmp.choose()
    assert os.environ[openmp.THREADS] == "5"
    assert SPINS not in os.environ
    assert hardware.choose_threads(None) == hardware.Choice(5, "OMP_NUM_THREADS")
