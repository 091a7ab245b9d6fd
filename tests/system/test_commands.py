"""The commands that a user is told: the files of a checkout there, and `onecard` and pip elsewhere."""

import os
import runpy
import subprocess
import sys

import pytest

from onecard.system import commands
from tests.support.paths import ROOT


@pytest.fixture(params=[True, False], ids=["checkout", "package"])
def in_checkout(request, monkeypatch) -> bool:
    monkeypatch.setattr(commands, "IN_CHECKOUT", request.param)
    return request.param


def test_this_is_a_checkout():
    assert commands.IN_CHECKOUT


def test_programs(in_checkout):
    texts = [commands.name("merge"), commands.line("continue"), commands.script("cpu_chat.sh", "chat")]
    if in_checkout:
        assert texts == [
            "tools/merge_lora.py",
            ".venv/bin/python finetune_continue.py",
            "bash cpu_chat.sh",
        ]
    else:
        assert texts == ["onecard merge", "onecard continue", "onecard chat"]


def test_packages(in_checkout):
    """Outside of a checkout too it is compiled for any processor: an extra cannot carry that setting."""
    texts = [commands.set_up("chat"), commands.set_up("cpu"), commands.pip_install("torch==2", "--quiet ")]
    if in_checkout:
        assert texts == [
            "bash tools/setup.sh chat",
            "bash tools/setup.sh cpu",
            ".venv/bin/pip install --quiet -c requirements.txt torch==2",
        ]
    else:
        assert texts == [
            'pip install "onecard[chat]"',
            'CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install "onecard[cpu]"',
            "pip install --quiet torch==2",
        ]


def test_a_missing_package(in_checkout):
    refusal = str(commands.not_installed(ModuleNotFoundError(name="gradio")))
    assert refusal.startswith(f"the package gradio is not installed for {sys.executable}. Run: ")
    assert refusal.endswith("use .venv/bin/python." if in_checkout else 'pip install "onecard[chat]"')
    assert commands.not_installed(ModuleNotFoundError(name="nobodys")) is None


def test_a_package_that_is_there_is_not_called_missing(in_checkout):
    """A missing part of a package is a fault of ours or of its version, which no set-up repairs."""
    assert commands.not_installed(ModuleNotFoundError(name="gradio.nosuch")) is None


def test_a_package_of_no_part(in_checkout):
    """deepspeed is built by hand, with the torch that is installed."""
    refusal = str(commands.not_installed(ModuleNotFoundError(name="deepspeed")))
    assert refusal.startswith(f"the package deepspeed is not installed for {sys.executable}. Run: ")
    assert refusal.endswith("deepspeed")
    assert "--no-build-isolation" in refusal
    assert commands.extra("wandb").endswith("wandb" if in_checkout else 'pip install "onecard[wandb]"')


def test_a_child_finds_the_checkout_and_nothing_of_its_folder(tmp_path, monkeypatch):
    """This holds whatever is in its working folder, and whether or not onecard is installed."""
    for name in ("onecard", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    line, variables = commands.child("finetune")
    assert variables["PYTHONPATH"] == os.pathsep.join([str(ROOT), "elsewhere"])
    ended = subprocess.run([*line, "--help"], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("usage: onecard finetune ")


def test_a_working_folder_that_is_gone_is_another_folder(monkeypatch):
    """On a network disk the system may not find it any more; the messages that name programs go on."""
    monkeypatch.setattr(os.path, "curdir", "/proc/none")
    runpy.run_path(str(ROOT / "onecard/training/wandb_run.py"))
    assert commands.line("continue") == f"{ROOT}/.venv/bin/python {ROOT}/finetune_continue.py"
