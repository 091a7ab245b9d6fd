"""OneCard as a package: what wheel and sdist hold, and what the command `onecard` does far from a checkout.

The wheel is really built and installed, by pip, into an environment of its own. Its dependencies are links to
those of the environment that runs the tests, since unpacking them takes minutes; pip then finds that they are
what the wheel asks for.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from onecard import __main__ as command
from onecard.system import commands
from tests.support import fresh_environment as fresh
from tests.support.paths import ROOT

NEEDS_A_CHECKOUT = {"sample/stages.sh"}  # it calls the programs as files
EXTRAS = fresh.PYPROJECT["optional-dependencies"]
BUILD_SDIST = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"


def pip(python: Path | str, *words: object, **settings) -> str:
    """What pip prints on stdout; words: its command and options."""
    line = [python, "-m", "pip", *words, "--disable-pip-version-check"]
    ended = subprocess.run(
        [*map(str, line)], capture_output=True, text=True, env=fresh.of_a_newcomer(), **settings
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def built(source: Path, folder: Path) -> Path:
    """The wheel of a folder or an sdist, made with the setuptools of this environment."""
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, source)
    return next(folder.glob("*.whl"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The project's files alone, since building writes files beside them."""
    return fresh.copy_project(tmp_path_factory.mktemp("source") / "onecard")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    return built(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> fresh.Environment:
    """An environment with the wheel and the packages of its extras for training and chatting."""
    environment = fresh.Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.link(fresh.closure(["train", "chat"]))
    pip(environment.bin / "python", "install", "--no-deps", "--quiet", wheel)
    return environment


class Elsewhere:
    """An empty working folder in which `onecard` is called."""

    def __init__(self, environment: fresh.Environment, folder: Path):
        self.environment, self.folder = environment, folder

    def run(self, line: str) -> subprocess.CompletedProcess:
        """Run a command as it is typed, with the programs of the environment first in the path."""
        path = f"{self.environment.bin}:{os.environ['PATH']}"
        variables = {**fresh.of_a_newcomer(), "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=variables, capture_output=True, text=True, timeout=600
        )

    def output(self, line: str) -> str:
        ended = self.run(line)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


@pytest.fixture(scope="module")
def elsewhere(installed, tiny_model, tmp_path_factory) -> Elsewhere:
    """A working folder with nothing but the base model."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "tiny").symlink_to(tiny_model)
    return Elsewhere(installed, folder)


TRAIN = "--model_path tiny --device cpu --bits 16 --max_steps 2 --batch_size 2 --test_size 0 --cutoff_len 512"


@pytest.fixture(scope="module")
def trained(elsewhere) -> str:
    """The output of a training for which only the model and its length were chosen."""
    return elsewhere.output(f"onecard finetune {TRAIN}")


# the contents of the wheel


def test_every_room_and_sample_is_in_the_wheel(source, wheel):
    """Each file of onecard/ and sample/ that git tracks is in it, byte for byte."""
    inside = contents(wheel)
    expected = {path.relative_to(source).as_posix(): path for path in source.glob("onecard/**/*.*")}
    expected |= {f"onecard/{p.relative_to(source).as_posix()}": p for p in source.glob("sample/**/*.*")}
    left_out = {f"onecard/{name}" for name in NEEDS_A_CHECKOUT}
    assert {name for name in inside if ".dist-info/" not in name} == set(expected) - left_out
    assert all(inside[name] == path.read_bytes() for name, path in expected.items() if name not in left_out)
    assert {"onecard/sample/instruct.json", "onecard/data/templates/alpaca.json"} <= set(inside)


def test_every_room_is_listed():
    """pyproject.toml lists the packages, and a new one must not be forgotten."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {f"onecard.{path.parent.name}" for path in ROOT.glob("onecard/*/__init__.py")}
    assert set(listed["packages"]) == {"onecard", "onecard.sample", *rooms}


def test_an_sdist_is_enough_for_the_same_wheel(source, wheel, tmp_path):
    (tmp_path / "dist").mkdir()
    copied = fresh.copy_project(tmp_path / "source")
    subprocess.run([sys.executable, "-c", BUILD_SDIST], cwd=copied, check=True, capture_output=True)
    sdist = next(copied.glob("dist/*.tar.gz"))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "sample/instruct.json"} <= names
    again = contents(built(sdist, tmp_path / "wheel"))
    assert again == contents(wheel)


def pins(lines: list[str]) -> dict[str, str]:
    """The one version that each package is asked for, by canonical name; "" for none."""
    requirements = [Requirement(line.partition(" --")[0]) for line in lines]
    return {canonicalize_name(each.name): str(each.specifier) for each in requirements}


def test_the_extras_carry_the_pins_of_requirements():
    """Each package has exactly the version of requirements.txt, above all torch."""
    written = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    all_of_them = pins([line for line in written if line and not line.startswith("#")])
    versions = pins([line for lines in EXTRAS.values() for line in lines if not line.startswith("onecard[")])
    assert versions["torch"] == "==2.13.0"
    assert {name: all_of_them.get(name) for name in versions} == versions
    assert all(re.fullmatch(r"==[\w.]+", version) for version in versions.values())
    assert fresh.PYPROJECT["dependencies"] == []


def test_pip_agrees_that_the_extras_are_there(installed, wheel):
    """With the packages of [train,chat] only the wheel itself is left to install."""
    address = f"onecard[train,chat] @ {wheel.as_uri()}"
    output = pip(installed.bin / "python", "install", "--dry-run", "--no-index", address)
    assert re.findall(r"^Would install (.*)$", output, re.MULTILINE) in ([], ["onecard-0.1.0"])
    without_address = pip(
        installed.bin / "python", "install", "--dry-run", "--no-index", "onecard[train,chat]"
    )
    assert "Would install" not in without_address, (
        "what our own messages tell to type asks an index for onecard"
    )


# what the installed command does


def test_the_command_lists_its_programs(elsewhere):
    listed = elsewhere.output("onecard --help")
    assert all(re.search(rf"^  {name} ", listed, re.MULTILINE) for name in command.PROGRAMS)
    assert elsewhere.output("python -m onecard --help") == listed


def test_nothing_of_a_checkout_is_used(elsewhere):
    code = (
        "import onecard; from onecard.system import commands; print(onecard.__file__, commands.IN_CHECKOUT)"
    )
    place, in_checkout = elsewhere.output(f'python -c "{code}"').split()
    assert Path(place).is_relative_to(elsewhere.environment.packages)
    assert in_checkout == "False"


@pytest.mark.parametrize("program", command.PROGRAMS)
def test_help_shows_the_command_as_it_is_called(elsewhere, program):
    """The help has usage and examples, and names nothing that only a checkout has."""
    text = elsewhere.output(f"onecard {program} --help")
    assert text.startswith(f"usage: onecard {program} ")
    assert re.search(rf"^(echo .*\| )?onecard {program} ", text, re.MULTILINE), "an example of its own line"
    assert "python " not in text.partition("\noptions:")[0]


def test_two_steps_on_the_samples(elsewhere, trained):
    """The demo's rows come with the package, and the run is written to the folder of the command."""
    run = elsewhere.folder / "lora-checkpoints" / "demo"
    assert "216 to train on" in trained
    assert json.loads((run / "finished.json").read_text(encoding="utf-8"))["steps"] == 2
    assert (run / "adapter_model.safetensors").is_file()
    assert {path.name for path in elsewhere.folder.iterdir()} <= {"tiny", "lora-checkpoints"}


def test_one_answer(elsewhere, trained):
    flags = "--terminal --device cpu --mode greedy --max_new_tokens 4 --lora_path lora-checkpoints/demo"
    assert elsewhere.output(f'echo "Say red" | onecard generate {flags}').strip()


def test_rows_are_looked_at(elsewhere):
    """A sample has the name that the documentation gives it."""
    output = elsewhere.output("onecard check-data --model_path tiny --data_path sample/chat.jsonl")
    assert re.search(r"\brows\b", output)


def test_going_on_is_told_as_it_is_typed(elsewhere, trained):
    """The commands of a checkout appear nowhere, and those that are printed work."""
    output = elsewhere.output(f"onecard finetune {TRAIN}")
    assert "onecard continue with a larger --num_epochs" in output
    longer = elsewhere.output("onecard continue --output_path lora-checkpoints/demo --max_steps 3")
    assert "step 3/3" in longer
    for text in (trained, output, longer):
        assert not re.search(r"\.venv|\.py\b|setup\.sh", text), text


def test_a_window_starts_its_trainings_there(installed, tiny_model, tmp_path):
    """As on a page, the child finds the package although a folder beside it has the same name."""
    (tmp_path / "tiny").symlink_to(tiny_model)
    (tmp_path / "onecard").mkdir()
    (tmp_path / "onecard" / "__init__.py").write_text("raise SystemExit('a stranger')\n")
    (tmp_path / "start.py").write_text(
        "import sys, time\nsys.path.pop(0)\nfrom pathlib import Path\n"
        "from onecard.config import options, training\nfrom onecard.runs import jobs\n"
        "made = options.parse(training.FinetuneConfig, sys.argv[1:])\n"
        "jobs.start(Path('lora-checkpoints'), 'page', made)\n"
        "while jobs.state(Path('lora-checkpoints'), 'page').going:\n    time.sleep(0.2)\n"
        "print(jobs.state(Path('lora-checkpoints'), 'page'))\n",
        encoding="utf-8",
    )
    assert "kind='finished'" in Elsewhere(installed, tmp_path).output(f"python start.py {TRAIN}")
    assert (tmp_path / "lora-checkpoints" / "page" / "adapter_model.safetensors").is_file()


def test_a_missing_package_is_told_with_its_extra(elsewhere):
    ended = elsewhere.run('echo "Say red" | onecard chat --model_path tiny')
    assert ended.returncode == 2
    expected = r"""\nerror: .*llama.* Run: CMAKE_ARGS="-DGGML_NATIVE=OFF" pip install "onecard\[cpu\]"\n$"""
    assert re.search(expected, "\n" + ended.stderr), ended.stderr


def test_without_any_extra_it_says_what_to_install(wheel, tmp_path):
    environment = fresh.Environment(tmp_path / "environment")
    pip(environment.bin / "python", "install", "--no-deps", "--quiet", wheel)
    ended = Elsewhere(environment, tmp_path).run("onecard finetune --output_path out")
    assert ended.returncode == 2
    assert re.fullmatch(r'error: .* Run: pip install "onecard\[train\]"\n', ended.stderr), ended.stderr


def test_an_installation_in_place_is_the_checkout(tmp_path):
    """tools/setup.sh makes it: the command works, messages name its files, and samples are the checkout's."""
    copied = fresh.copy_project(tmp_path / "source")
    environment = fresh.Environment(copied / ".venv")
    environment.link(["setuptools"])
    python = environment.bin / "python"
    pip(python, "install", "--no-deps", "--no-build-isolation", "--quiet", "-e", copied)
    there = Elsewhere(environment, tmp_path)
    assert there.output("onecard merge --help").startswith("usage: onecard merge ")
    code = "from onecard.system import commands, files as f; from pathlib import Path"
    code += "; print(commands.line('continue'), f.or_sample(Path('sample/chat.jsonl')))"
    output = there.output(f'python -c "{code}"')
    programs = f"{copied / '.venv/bin/python'} {copied / 'finetune_continue.py'}"
    assert output == f"{programs} {copied / 'sample' / 'chat.jsonl'}\n"


# how a checkout calls the same programs


@pytest.mark.parametrize("program", command.PROGRAMS)
def test_every_program_is_a_file_too(program):
    """The file that messages name in a checkout starts exactly this sub-command."""
    file = ROOT / commands.FILES[program]
    assert f'start("{program}")' in file.read_text(encoding="utf-8")
    assert set(commands.FILES) == set(command.PROGRAMS)
