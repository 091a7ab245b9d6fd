"""tools/setup.sh on a machine that is not as it should be, and beside another set-up.

There is no network, no space, no suitable Python, or the environment was moved. The copies of the project are
those of tests/support/set_up.py.
"""

import contextlib
import fcntl
import select
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import set_up
from tests.support.set_up import NO_NETWORK, PYTHON, make_venv, mark_complete, pip_runs, script


@pytest.fixture
def project(tmp_path) -> Path:
    """The files that the set-up reads, in an empty folder."""
    return set_up.copy_project(tmp_path / "onecard")


@pytest.mark.parametrize("moved", [shutil.move, lambda old, new: shutil.copytree(old, new, symlinks=True)])
def test_an_environment_that_was_moved_is_made_again(project, tmp_path, moved):
    """Its programs name the Python of the old place, so they would not start or would use the old one."""
    make_venv(project)
    mark_complete(project)
    assert set_up.run(project).returncode == 0
    moved(project, tmp_path / "moved")
    ended = set_up.run(tmp_path / "moved")
    assert "It was created in another folder, where its programs would look for Python." in ended.stdout
    first = (tmp_path / "moved/.venv/bin/pip").read_text(encoding="utf-8").partition("\n")[0]
    assert first.startswith(f"#!{tmp_path}/moved/.venv/bin/python")
    assert (ended.returncode, ended.stderr) == (2, NO_NETWORK)


def test_a_python_without_venv_is_named(project):
    """For Debian's Python without python3-venv its words come first, then ours.

    Nothing is said about a network.
    """
    refuse = '[ "$1 $2" = "-m venv" ] && { echo "ensurepip is not available"; exit 1; }'
    python = script(project / "python3", f'{refuse}\nexec {PYTHON} "$@"')
    ended = set_up.run(project, set_up.environment(python))
    assert ended.returncode == 2
    assert ended.stderr.startswith("ensurepip is not available\nerror: ")
    assert "apt install python3-venv" in ended.stderr
    assert "network" not in ended.stderr


OLD = "import sys; sys.version_info = (3, 9, 2, 'final', 0)"


def test_an_old_python_is_named(project):
    """Nothing is created with it. A complete environment needs the Python of the system no more."""
    versions = f"""[ "$1" != -V ] || {{ echo "Python 3.9.2"; exit 0; }}
exec {PYTHON} -c "{OLD}
$2" """
    python = script(project / "old-python", versions)
    ended = set_up.run(project, set_up.environment(python))
    assert ended.returncode == 2
    assert ended.stderr == (
        f"error: OneCard needs Python 3.11 or newer, {python} is 3.9.2. "
        "Install a newer one, or set PYTHON to its path.\n"
    )
    assert not (project / ".venv").exists()
    make_venv(project, pip=False)
    mark_complete(project)
    assert set_up.run(project, set_up.environment(python)).returncode == 0


def test_an_environment_of_an_old_python_is_made_again(project):
    make_venv(project)
    (project / ".venv/bin/python").unlink()
    old = f"""[ "$1 $2" != "-I -c" ] || exec -a "$0" {PYTHON} -I -c "{OLD}
$3"
exec -a "$0" {PYTHON} "$@" """
    script(project / ".venv/bin/python", old)
    ended = set_up.run(project)
    assert "older than 3.11" in ended.stdout
    assert (project / ".venv/bin/python").is_symlink()


def test_python_may_be_named_by_a_relative_path(project, tmp_path):
    """It belongs to the folder in which the set-up is called."""
    script(tmp_path / "my-python", f'touch {tmp_path}/used; exec {PYTHON} "$@"')
    command = ["bash", "onecard/tools/setup.sh", "train"]
    variables = set_up.environment(Path("./my-python"))
    ended = subprocess.run(
        command, cwd=tmp_path, env=variables | {"PYTHON": "./my-python"}, capture_output=True
    )
    assert ended.stderr.decode() == NO_NETWORK
    assert (tmp_path / "used").exists()


@pytest.mark.parametrize("megabytes", [pytest.param(1, marks=pytest.mark.ci), 5])
def test_a_full_disk_is_named(tmp_path, megabytes):
    """Also when pip found it full, whose words venv keeps to itself. With room the same command continues."""
    with set_up.small_disk(tmp_path / "disk", megabytes):
        project = set_up.copy_project(tmp_path / "disk/onecard")
        filled = tmp_path / "disk/filled"
        with contextlib.suppress(OSError):
            if megabytes == 1:
                filled.write_bytes(bytes(2**20))
        ended = set_up.run(project)
        assert ended.returncode == 2
        assert ended.stderr.startswith(
            f"error: There is no space left for {project}/.venv or for the temporary"
        )
        assert ended.stderr.count("\n") == 1
        filled.unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=60m", str(tmp_path / "disk")], check=True)
        assert set_up.run(project).stderr == NO_NETWORK
        assert pip_runs(project)


@pytest.mark.parametrize("completes", [False, True])
def test_only_one_set_up_at_a_time(project, completes):
    """A second one waits and says so; when the first has completed the part, nothing is left to do."""
    make_venv(project)
    before = sorted(path.name for path in (project / ".venv").iterdir())
    with open(project / ".venv.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(
            ["bash", "tools/setup.sh", "train"],
            cwd=project,
            env=set_up.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert select.select([process.stdout], [], [], 60)[0], "it says nothing"
            assert process.stdout.readline() == "Another set-up is running here; waiting for it to end ...\n"
            assert process.poll() is None
            assert sorted(path.name for path in (project / ".venv").iterdir()) == before
            if completes:
                mark_complete(project)
        except BaseException:
            process.kill()
            raise
    try:
        output, words = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, words) == ((0, "") if completes else (2, NO_NETWORK))
    assert (output == "") == completes
