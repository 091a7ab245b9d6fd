"""tools/setup.sh after a set-up that was stopped at any point: the next one repairs it or says what is wrong.

The real script runs in a copy of the project. No package index can be reached, so each run ends at the first
download, after everything that is tested here.
"""

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PYTHON = Path(os.path.realpath(sys.executable))
NO_INDEX = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
NETWORK = "Check the network if that is the reason."
PACKAGES = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": ".venv"}))


@pytest.fixture
def project(tmp_path) -> Path:
    """The files that the set-up reads, in an empty folder."""
    (tmp_path / "tools").mkdir()
    for name in ("finetune.sh", "tools/setup.sh", "tools/launch.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def environment(python: Path = PYTHON) -> dict[str, str]:
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VIRTUAL"))
    }
    return {**inherited, **NO_INDEX, "PYTHON": str(python)}


def set_up(
    project: Path, python: Path = PYTHON, part: str = "train", **changes
) -> subprocess.CompletedProcess:
    command = ["bash", "tools/setup.sh", part]
    settings = {"capture_output": True, "text": True, "timeout": 120}
    return subprocess.run(command, cwd=project, env=environment(python) | changes, **settings)


@functools.cache
def whole_venv() -> Path:
    """An environment with pip, which is made once because installing pip takes seconds."""
    folder = Path(tempfile.mkdtemp(prefix="onecard-venv-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    subprocess.run([PYTHON, "-m", "venv", folder], check=True)
    return folder


def make_venv(project: Path, pip: bool = True) -> None:
    if pip:
        shutil.copytree(whole_venv(), project / ".venv", symlinks=True)
    else:
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", ".venv"], cwd=project, check=True)


def mark_complete(project: Path) -> Path:
    """Write the stamp that a set-up of `train` writes last."""
    script = 'echo ".venv/onecard-train-$(cat requirements.txt pyproject.toml | cksum | cut -d" " -f1)"'
    named = subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True, check=True)
    stamp = project / named.stdout.strip()
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    return stamp


def pip_runs(project: Path) -> bool:
    listed = subprocess.run(
        [project / ".venv/bin/python", "-m", "pip", "list"], capture_output=True, text=True
    )
    return listed.returncode == 0 and "pip " in listed.stdout


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


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
    ended = set_up(project)
    assert pip_runs(project)
    assert (project / ".venv/bin/activate").is_file()
    assert not list((project / PACKAGES).glob("~*"))
    assert NETWORK in ended.stderr
    assert ended.returncode == 2
    assert "No module named pip" not in ended.stderr
    assert not list((project / ".venv").glob("onecard-*"))


def test_what_is_whole_stays(project):
    """A complete .venv is not made again, and a package with all of its files keeps its metadata."""
    make_venv(project)
    whole, unfinished = (project / PACKAGES / f"{name}-1.dist-info" for name in ("whole", "unfinished"))
    for info in (whole, unfinished):
        info.mkdir()
        (info / "METADATA").touch()
    (whole / "INSTALLER").write_text("pip\n", encoding="utf-8")
    ended = set_up(project)
    assert whole.is_dir()
    assert not unfinished.exists(), "pip would take it for installed"
    assert "again" not in ended.stdout
    assert "put back" not in ended.stdout


def test_a_complete_set_up_is_left_alone(project):
    make_venv(project, pip=False)
    mark_complete(project)
    ended = set_up(project)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_link_is_never_emptied(project):
    """.venv may be a link to an environment of somebody else."""
    (project / "elsewhere/bin").mkdir(parents=True)
    (project / "elsewhere/notes.txt").touch()
    (project / ".venv").symlink_to("elsewhere")
    ended = set_up(project)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: .venv is a link to elsewhere")
    assert (project / "elsewhere/notes.txt").is_file()


def test_a_python_without_venv_is_named(project):
    """For Debian's Python without python3-venv its words come first, then ours.

    Nothing is said about a network.
    """
    refuse = '[ "$1 $2" = "-m venv" ] && { echo "ensurepip is not available"; exit 1; }'
    ended = set_up(project, script(project / "python3", f'{refuse}\nexec {PYTHON} "$@"'))
    assert ended.returncode == 2
    assert ended.stderr.startswith("ensurepip is not available\nerror: ")
    assert "apt install python3-venv" in ended.stderr
    assert "network" not in ended.stderr


def test_a_half_made_environment_beside_it_is_made_again(project):
    """This is .venv/gptq, which the tests need. Here pip and apt-get do nothing and report success."""
    make_venv(project)
    (project / PACKAGES / "pip/__main__.py").write_text("", encoding="utf-8")
    (project / "bin").mkdir()
    script(project / "bin/apt-get", "exit 0")
    apart = project / ".venv/gptq/bin/python"
    apart.parent.mkdir(parents=True)
    apart.symlink_to("/nowhere/python3")
    ended = set_up(project, part="test", PATH=f"{project / 'bin'}:{os.environ['PATH']}")
    assert ended.returncode == 0, ended.stderr
    assert "skipped" not in ended.stdout
    subprocess.run([apart, "-c", "import pip"], check=True)


@pytest.mark.parametrize(
    ("part", "extras", "complete"),
    [
        ("train", "train", {"train"}),
        ("chat", "chat", {"chat", "train"}),
        ("cpu", "cpu", {"cpu", "train"}),
        ("all", "train,wandb,chat,cpu,gptq", {"all", "train", "chat", "cpu", "gptq"}),
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
    ended = set_up(project, part=part)
    assert ended.returncode == 0, ended.stderr
    calls = (project / "asked").read_text(encoding="utf-8")
    assert f"-m pip install -c requirements.txt -e .[{extras}]\n" in calls
    assert ("llama_cpp_converter" in calls) == ("cpu" in complete)
    stamps = {path.name.split("-")[1] for path in (project / ".venv").glob("onecard-*")}
    assert stamps == complete
    (project / "asked").unlink()
    assert all(set_up(project, part=each).returncode == 0 for each in complete)
    assert not (project / "asked").exists()


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
        env=environment(stub),
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
        assert NETWORK in set_up(project).stderr
        assert pip_runs(project)
