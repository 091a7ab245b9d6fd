"""The shell scripts from any folder, to which relative paths in variables, options and config files belong.

Here a script that prints its folder and its arguments takes the place of Python.
"""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.system import commands
from tests.support.paths import ROOT

CHAT = {"MODEL_PATH": "--model_path", "LORA_PATH": "--lora_path"}
RUN = {"DATA_PATH": "--data_path", "OUTPUT_PATH": "--output_path", "MODEL_PATH": "--model_path"}
ENTRIES = {  # script: the program that it starts, and the option for each of its variables
    "finetune.sh": ("finetune.py", RUN),
    "finetune_continue.sh": (
        "finetune_continue.py",
        {"OUTPUT_PATH": "--output_path", "LORA_CHECKPOINT": "--resume_from_checkpoint"},
    ),
    "finetune_others_continue.sh": (
        "finetune_continue.py",
        RUN | {"LORA_CHECKPOINT": "--resume_from_checkpoint"},
    ),
    "generate.sh": ("generate.py", CHAT),
    "interaction.sh": ("interaction.py", CHAT),
    "serve.sh": ("serve/app.py", CHAT),
    "alpaca-serve.sh": ("interaction.py", CHAT),
    "cpu_chat.sh": ("tools/cpu_chat.py", {"BASE_MODEL": "--model_path", "LORA_PATH": "--lora_path"}),
}
TRAININGS = [name for name in ENTRIES if name.startswith("finetune")]
PRINT = '#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n'
SET_UP = 'test "$1" != ""\n'


@pytest.fixture
def clone(tmp_path) -> Path:
    """The scripts in a folder with a space in its name, with stand-ins for set-up and Python."""
    folder = tmp_path / "a clone"
    for name in (*ENTRIES, "tools/launch.sh", "tools/download_llama.sh", "sample/stages.sh"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "tools/setup.sh").write_text(SET_UP, encoding="utf-8")
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PRINT, encoding="utf-8")
    python.chmod(0o755)
    return folder


@pytest.fixture
def place(tmp_path) -> Path:
    """The user's folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def called(script: Path, place: Path, *arguments: str, **variables: str) -> tuple[Path, list[str]]:
    """The folder of the Python that a script starts, and its arguments."""
    hidden = ("TOT_CUDA", "BASE_MODEL", "MODEL_PATH", "LORA_PATH", "DATA_PATH", "OUTPUT_PATH", "PYTHON")
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    settings = {"cwd": place, "env": inherited | variables, "capture_output": True, "text": True}
    ended = subprocess.run(["bash", str(script), *arguments], check=True, **settings)
    folder, *rest = ended.stdout.splitlines()
    return Path(folder), rest


@pytest.mark.parametrize("name", ENTRIES)
def test_paths_belong_to_the_users_folder(clone, place, name):
    """The program runs in the user's folder, and gets the paths as they were typed."""
    program, options = ENTRIES[name]
    values = {variable: f"my {variable}/x" for variable in options}
    arguments = ["--config", "my.json", "--template=mine/template.json"]
    folder, rest = called(clone / name, place, *arguments, **values)
    assert folder == place
    assert rest[0] == str(clone / program)
    pairs = {(option, values[variable]) for variable, option in options.items()}
    assert pairs <= set(itertools.pairwise(rest))
    assert rest[-3:] == arguments


@pytest.mark.parametrize("name", ENTRIES)
def test_the_name_of_the_script_may_be_relative_or_a_link(clone, place, name):
    """CDPATH, with which `cd` goes elsewhere and prints where, changes nothing."""
    expected = called(clone / name, place)
    assert expected[1][0] == str(clone / ENTRIES[name][0])
    assert called(Path("..", clone.name, name), place, CDPATH=str(clone)) == expected
    (place / "link").symlink_to(clone / name)
    assert called(Path("link"), place) == expected


@pytest.mark.parametrize("name", TRAININGS)
def test_several_gpus_change_nothing(clone, place, name):
    """Python must not import a module of the user's folder there."""
    folder, rest = called(clone / name, place, "--x", "y", TOT_CUDA="0,1", OUTPUT_PATH="mine")
    assert folder == place
    assert rest[:3] == ["-P", "-m", "torch.distributed.run"]
    assert str(clone / ENTRIES[name][0]) in rest
    assert rest[-4:] == ["--output_path", "mine", "--x", "y"]


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in TRAININGS])
def test_the_demo_adapter_is_looked_for_here_and_then_in_the_clone(clone, place, name):
    demo = Path("lora-checkpoints/demo")
    assert "--lora_path" not in called(clone / name, place)[1]
    (clone / demo).mkdir(parents=True)
    assert called(clone / name, place)[1][1:] == ["--lora_path", str(clone / demo)]
    (place / demo).mkdir(parents=True)
    assert called(clone / name, place)[1][1:] == ["--lora_path", str(demo)]


def test_a_llama_folder_is_downloaded_to_the_users_folder(clone, place):
    script = clone / "tools/download_llama.sh"
    folder, rest = called(script, place, "7B", "llama/7B", BASE_URL="http://127.0.0.1:9/llama")
    assert folder == place
    assert rest[0] == str(clone / "tools/download.py")
    assert rest[-2:] == ["--to", "llama/7B"]


def test_the_stages_are_written_to_the_users_folder(clone, place):
    """All five programs run there. The rows are found as finetune.py finds its samples."""
    folder, rest = called(clone / "sample/stages.sh", place, MODEL_PATH="mine/base", OUTPUT_PATH="out")
    assert [str(folder), *rest].count(str(place)) == 5
    assert rest[rest.index("--model_path") + 1] == "mine/base"
    assert str(clone / "sample/pieces.txt") in rest
    assert rest.count("sample/text.jsonl") == 2
    assert [rest[index + 1] for index, word in enumerate(rest) if word == "--output_path"] == [
        f"out/{name}" for name in ("tokenizer", "base", "embed", "pretrain", "sft")
    ]


def test_the_real_program_reads_a_config_file_of_the_users_folder(clone, place):
    """The message comes from finetune.py itself, and names what is in the file."""
    for name in ("onecard", "finetune.py"):
        (clone / name).symlink_to(ROOT / name)
    (clone / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    (place / "my.json").write_text('{"no_such_option": 1}', encoding="utf-8")
    command = ["bash", str(clone / "finetune.sh"), "--config", "my.json"]
    ended = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no_such_option" in ended.stderr


def test_messages_name_what_can_be_typed_here(tmp_path, monkeypatch):
    """From another folder than the clone, a command that is to be typed has whole paths."""
    assert commands.line("continue") == ".venv/bin/python finetune_continue.py"
    monkeypatch.chdir(tmp_path)
    assert commands.line("continue") == f"{ROOT}/.venv/bin/python {ROOT}/finetune_continue.py"
    assert commands.script("cpu_chat.sh", "chat") == f"bash {ROOT}/cpu_chat.sh"
    assert commands.set_up("cpu") == f"bash {ROOT}/tools/setup.sh cpu"
    assert commands.pip_install("x") == f"{ROOT}/.venv/bin/pip install -c {ROOT}/requirements.txt x"
