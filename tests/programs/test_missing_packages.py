"""What works with each part of the set-up, and what a program that needs another part says."""

import os
import pty
import re
import subprocess

import pytest
from packaging.requirements import Requirement

from onecard import __main__ as command
from onecard import errors
from onecard.system import commands
from tests.support import fresh_environment as fresh
from tests.support.paths import ROOT

PROGRAMS = ["finetune.py", "finetune_continue.py", "generate.py", "interaction.py"]
ASK = 'echo "Say red" | .venv/bin/python'


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """A function that gives, for a part of the set-up ("" for none), a newcomer who has only that part."""
    there: dict[str, fresh.Newcomer] = {}

    def make(part: str) -> fresh.Newcomer:
        if part not in there:
            there[part] = fresh.Newcomer(tmp_path_factory.mktemp(part or "nothing") / "onecard")
            (there[part].folder / "tiny").symlink_to(tiny_model)
            if part:
                there[part].set_up(part)
        return there[part]

    return make


def refused(ended: subprocess.CompletedProcess, module: str, part: str) -> None:
    """There is one line that says what to run, and the exit code is 2."""
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    expected = rf"error: .*{re.escape(module)}.* Run: bash tools/setup\.sh {part}\b.*\n"
    assert re.fullmatch(expected, ended.stderr), ended.stderr


def test_a_pipe_needs_no_editor(made):
    """With only the packages for training, generate.py and interaction.py answer in scripts."""
    for program in ("generate.py", "interaction.py"):
        command = (
            f"{ASK} {program} --terminal --model_path tiny --device cpu --max_new_tokens 4 --mode greedy"
        )
        ended = made("train").run(command)
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.strip()


@pytest.mark.parametrize("program", ["generate.py", "interaction.py"])
def test_a_window_says_what_it_lacks(made, program):
    refused(made("train").run(f".venv/bin/python {program} --model_path tiny"), "gradio", "chat")


@pytest.mark.parametrize("part", ["train", "chat"])
def test_llama_cpp_is_missed_at_once(made, part):
    """The program that can use nothing else says so at once."""
    refused(made(part).run(f"{ASK} tools/cpu_chat.py --model_path tiny"), "llama_cpp", "cpu")


def test_an_engine_says_what_it_lacks(made):
    """Lines about the model may come before the error."""
    ended = made("train").run(f"{ASK} generate.py --terminal --engine llama.cpp --model_path tiny")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.search(r"\nerror: llama-cpp-python .* Run: bash tools/setup\.sh cpu\n$", "\n" + ended.stderr)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("program", "part"),
    [("generate.py --terminal", "chat"), ("interaction.py --terminal", "chat"), ("tools/cpu_chat.py", "cpu")],
)
def test_a_terminal_says_what_it_lacks_before_it_loads(made, program, part):
    """A terminal needs prompt_toolkit; when it is missing, the program says so at once."""
    ours, theirs = pty.openpty()
    python = made("train").folder / ".venv/bin/python"
    command = [str(python), *program.split(), "--model_path", "nowhere"]
    process = subprocess.run(
        command, cwd=made("train").folder, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, text=True
    )
    os.close(theirs)
    os.close(ours)
    assert process.returncode == 2
    expected = rf"error: .*prompt_toolkit.* Run: bash tools/setup\.sh {part}, .*\n"
    assert re.fullmatch(expected, process.stderr), process.stderr


@pytest.mark.parametrize("program", [*PROGRAMS, *sorted(f"tools/{p.name}" for p in ROOT.glob("tools/*.py"))])
def test_without_any_package_nothing_is_a_traceback(made, program):
    """With the Python of the system, for example, one line names the set-up; --help needs no package."""
    assert made("").run(f".venv/bin/python {program} --help").returncode == 0
    options = "--output_path out --data_path sample/instruct.json" if program == "finetune.py" else ""
    ended = made("").run(f".venv/bin/python {program} {options}")
    assert ended.returncode in (2, 3, 4)
    assert re.search(r"^error: .*\n$", ended.stderr, re.MULTILINE), ended.stderr
    assert "Traceback" not in ended.stderr
    if program in ("finetune.py", "generate.py", "interaction.py"):
        assert "bash tools/setup.sh" in ended.stderr


@pytest.mark.parametrize(
    ("part", "modules"),
    [
        ("train", "training.loop, hub.locate, training.metrics, data.check, ui.terminal"),
        ("chat", "ui.page, ui.single_window, ui.chat_window, ui.training_window, ui.line_editor"),
        ("cpu", "conversion.gguf, ui.line_editor, inference.llama_cpp"),
    ],
)
def test_a_part_is_enough_for_its_modules(made, part, modules):
    imports = ", ".join(f"onecard.{module}" for module in modules.split(", "))
    library = "; onecard.inference.llama_cpp.library()" if part == "cpu" else ""
    ended = made(part).run(f'.venv/bin/python -c "import {imports}{library}"')
    assert ended.returncode == 0, ended.stderr


def test_the_closure_leaves_out_what_is_another_parts(made):
    """Without this the tests above could not fail."""
    for part, missing in (
        ("train", "prompt_toolkit"),
        ("chat", "llama_cpp"),
        ("cpu", "gradio"),
        ("", "torch"),
    ):
        ended = made(part).run(f'.venv/bin/python -c "import {missing}"')
        assert f"No module named '{missing}'" in ended.stderr


def test_every_package_of_the_set_up_is_known():
    """commands.PARTS names the module of each requirement under the part that brings it first."""
    modules = {
        "protobuf": "google.protobuf",
        "llama-cpp-python": "llama_cpp",
        "markdown-it-py": "markdown_it",
        "prometheus-client": "prometheus_client",
        "python-multipart": "python_multipart",
    }
    for part in ("train", "chat", "cpu", "gptq", "serve"):
        for line in fresh.PYPROJECT["optional-dependencies"][part]:
            name = Requirement(line).name
            if name != "onecard":
                module = modules.get(name, name)
                assert any(module in commands.PARTS[each].split() for each in (part, "chat")), name


def test_a_module_of_nobody_is_a_traceback():
    """This is a mistake of ours or of a library, so there is nothing that the user could install."""

    def broken(_: list[str]) -> None:
        import onecard.no_such_module  # noqa: F401

    with pytest.raises(ModuleNotFoundError):
        errors.run_program(lambda: command.run(broken, []))
