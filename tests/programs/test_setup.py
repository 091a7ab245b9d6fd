"""tools/setup.sh after a set-up that was stopped at any point: the next one repairs it or says what is wrong.

The real script runs in a copy of the project. No package index can be reached, so each run ends at the first
download, after everything that is tested here. Whole set-ups are in test_setup_whole.py.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import fresh_environment, set_up
from tests.support.set_up import NO_NETWORK, PACKAGES, PYTHON, make_venv, mark_complete, pip_runs, script


@pytest.fixture
def project(tmp_path) -> Path:
    """The files that the set-up reads, in an empty folder."""
    return set_up.copy_project(tmp_path / "onecard")


def without_pip(project: Path) -> None:
    """An environment as `uv venv` makes it: complete, but without pip."""
    make_venv(project, pip=False)


def stopped_in_ensurepip(project: Path) -> None:
    """Ctrl-C while venv installs pip leaves neither pip nor bin/activate, which venv writes last."""
    without_pip(project)
    for path in (project / ".venv/bin").glob("[aA]ctivate*"):
        path.unlink()


def broken_link(project: Path) -> None:
    """The environment was complete, but the Python with which it was made was removed."""
    without_pip(project)
    (project / ".venv/bin/python").unlink()
    (project / ".venv/bin/python").symlink_to("/nowhere/python3")
    mark_complete(project)


def half_removed_pip(project: Path) -> None:
    """pip was replacing itself: its old files were moved away, and its old metadata is still there."""
    make_venv(project)
    (project / PACKAGES / "pip").rename(project / PACKAGES / "~ip")


def half_written_pip(project: Path) -> None:
    """pip was replacing itself: the new files are there, but not what pip writes after them."""
    make_venv(project)
    (info,) = (project / PACKAGES).glob("pip-*.dist-info")
    (info / "INSTALLER").unlink()
    shutil.rmtree(project / PACKAGES / "pip/_internal/operations")


@pytest.mark.parametrize(
    "state",
    [
        without_pip,
        stopped_in_ensurepip,
        broken_link,
        half_removed_pip,
        half_written_pip,
    ],
)
def test_a_stopped_set_up_is_mended(project, state):
    """Whatever is in .venv, Python and pip run afterwards, before the network is needed."""
    state(project)
    ended = set_up.run(project)
    assert pip_runs(project)
    assert (project / ".venv/bin/activate").is_file()
    assert not list((project / PACKAGES).glob("~*"))
    assert (ended.returncode, ended.stderr) == (2, NO_NETWORK)
    assert not list((project / ".venv").glob("onecard-*"))


def add_package(project: Path, name: str, installer: str = "pip", size: int = 5) -> Path:
    """A package as pip leaves it when it is done, and its metadata; size: that of its file in its RECORD."""
    packages = project / PACKAGES
    (packages / f"{name}.py").write_text("x = 1", encoding="utf-8")
    info = packages / f"{name}-1.dist-info"
    info.mkdir()
    (info / "INSTALLER").write_text(f"{installer}\n", encoding="utf-8")
    record = f"{name}.py,sha256=x,{size}\n__pycache__/{name}.pyc,,\n{name}-1.dist-info/RECORD,,\n"
    (info / "RECORD").write_text(record, encoding="utf-8")
    return info


def test_what_is_whole_stays(project):
    """A complete .venv is not made again, and a package with all of its files keeps its metadata.

    A package with a file that is missing or cut short loses it, so that pip installs the package again.
    """
    make_venv(project)
    whole = [add_package(project, "whole"), add_package(project, "another_tool", installer="uv", size=6)]
    unfinished = [add_package(project, name) for name in ("no_installer", "no_record", "no_file")]
    unfinished.append(add_package(project, "cut_short", size=6))
    (unfinished[0] / "INSTALLER").unlink()
    (unfinished[1] / "RECORD").unlink()
    (project / PACKAGES / "no_file.py").unlink()
    ended = set_up.run(project)
    assert all(info.is_dir() for info in whole)
    assert not any(info.exists() for info in unfinished), "pip would take it for installed"
    assert "again" not in ended.stdout
    assert "put back" not in ended.stdout


def test_only_the_stamps_of_these_versions_stay(project):
    """A part stays complete while another is added. When versions change, none does, for good."""
    make_venv(project)
    stamp = mark_complete(project)
    other = project / ".venv/onecard-train-1"
    other.touch()
    set_up.run(project, part="chat")
    assert stamp.exists()
    assert not other.exists()


def test_a_complete_set_up_is_left_alone(project):
    make_venv(project, pip=False)
    mark_complete(project)
    ended = set_up.run(project)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_link_is_never_emptied(project):
    """.venv may be a link to an environment of somebody else."""
    (project / "elsewhere/bin").mkdir(parents=True)
    (project / "elsewhere/notes.txt").touch()
    (project / ".venv").symlink_to("elsewhere")
    ended = set_up.run(project)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: .venv is a link to elsewhere")
    assert (project / "elsewhere/notes.txt").is_file()


def test_a_half_made_environment_beside_it_is_made_again(project):
    """This is .venv/gptq, which the tests need. Here pip and apt-get do nothing and report success."""
    make_venv(project)
    (project / PACKAGES / "pip/__main__.py").write_text("", encoding="utf-8")
    (info,) = (project / PACKAGES).glob("pip-*.dist-info")
    (info / "INSTALLER").write_text("us", encoding="utf-8")  # so that pip is not taken for cut short
    (project / "bin").mkdir()
    script(project / "bin/apt-get", "exit 0")
    apart = project / ".venv/gptq/bin/python"
    apart.parent.mkdir(parents=True)
    apart.symlink_to("/nowhere/python3")
    variables = set_up.environment(PATH=f"{project / 'bin'}:{os.environ['PATH']}")
    ended = set_up.run(project, variables, part="test")
    assert ended.returncode == 0, ended.stderr
    assert "skipped" not in ended.stdout
    subprocess.run([apart, "-c", "import pip"], check=True)


@pytest.mark.parametrize(
    ("part", "extras", "complete"),
    [
        ("train", ["train"], {"train"}),
        ("chat", ["chat", "train"], {"chat", "train"}),
        ("cpu", ["cpu", "train"], {"cpu", "train"}),
        ("serve", ["serve", "cpu", "train"], {"serve", "cpu", "train"}),
        (
            "all",
            ["train", "wandb", "chat", "cpu", "gptq", "serve"],
            {"all", "train", "chat", "cpu", "gptq", "serve"},
        ),
    ],
)
def test_a_part_is_installed_in_place_and_marked_complete(project, part, extras, complete):
    """The parts that it includes are marked too, so that no program sets up again.

    Here pip and the converter do nothing.
    """
    make_venv(project)
    (project / ".venv/bin/python").unlink()
    quiet = 'case "$*" in *"pip install"* | *llama_cpp_converter*) echo "$*" >>asked; exit 0;; esac'
    script(project / ".venv/bin/python", f'{quiet}\nexec -a "$0" {PYTHON} "$@"')
    ended = set_up.run(project, part=part)
    assert ended.returncode == 0, ended.stderr
    calls = (project / "asked").read_text(encoding="utf-8")
    hashes = "--require-hashes -c requirements-hashes.txt"
    declared = fresh_environment.PYPROJECT["optional-dependencies"]
    names = {line for each in extras for line in declared[each] if not line.startswith("onecard[")}
    (line,) = [each for each in calls.splitlines() if " torch==" in each]
    assert set(line.removeprefix(f"-m pip install {hashes} ").split()) - names == {"setuptools==84.2.1"}
    assert names <= set(line.split())
    assert "-m pip install --no-deps --no-build-isolation -e .\n" in calls
    assert ("llama_cpp_converter" in calls) == ("cpu" in complete)
    stamps = {path.name.split("-")[1] for path in (project / ".venv").glob("onecard-*")}
    assert stamps == complete
    (project / "asked").unlink()
    assert all(set_up.run(project, part=each).returncode == 0 for each in complete)
    assert not (project / "asked").exists()


def test_without_the_names_of_its_packages_a_part_is_not_complete(project):
    """Here Python cannot read them from pyproject.toml."""
    make_venv(project)
    (project / ".venv/bin/python").unlink()
    fails = 'case "$*" in *"pip install"*) exit 0;; *tomllib*) echo "MemoryError" >&2; exit 1;; esac'
    script(project / ".venv/bin/python", f'{fails}\nexec -a "$0" {PYTHON} "$@"')
    ended = set_up.run(project)
    assert ended.returncode == 2
    assert ended.stderr == (
        "MemoryError\n"
        "error: The packages of 'train' could not be read from pyproject.toml; the reason is above.\n"
    )
    assert not list((project / ".venv").glob("onecard-*"))


# the moment of Ctrl-C: the words in the command that Python is running then
MOMENTS = {"venv": "-m venv", "ensurepip": "-m ensurepip", "pip": "-m pip install"}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_it_with_one_line(project, moment):
    """The exit code is 130 with one line, and the next set-up repairs what was left."""
    sleep = f'touch reached; exec {PYTHON} -c "import time; time.sleep(60)"'
    slow = f'case "$*" in *"{MOMENTS[moment]}"*) {sleep};; esac'
    stub = script(project / "slow-python", f'{slow}\nexec -a "$0" {PYTHON} "$@"')
    if moment != "venv":
        make_venv(project, pip=moment != "ensurepip")
        (project / ".venv/bin/python").unlink()
        shutil.copy(stub, project / ".venv/bin/python")
    process = subprocess.Popen(
        ["bash", "finetune.sh"],
        cwd=project,
        env=set_up.environment(stub),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(600):
        if (project / "reached").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    time.sleep(0.3)  # until the sleeping Python handles Ctrl-C
    os.killpg(process.pid, signal.SIGINT)
    _, words = process.communicate(timeout=30)
    assert process.returncode == 130, words
    assert words == "stopped by Ctrl-C. Run the same command again to continue.\n"
    if moment == "venv":
        assert set_up.run(project).stderr == NO_NETWORK
        assert pip_runs(project)
