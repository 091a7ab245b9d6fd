"""Whole set-ups of a tiny project that is stopped at many moments, has no network or no space, or is moved.

Each ends with a complete environment whose programs run. tests/support/set_up.py has the packages.
"""

import hashlib
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from tests.support import set_up

pytestmark = pytest.mark.ci


@pytest.fixture
def project(tmp_path) -> Path:
    set_up.tiny_packages()
    return set_up.tiny_project(tmp_path / "a project")


def started(project: Path) -> subprocess.Popen:
    """A set-up in a session of its own, as in a terminal."""
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    command = ["bash", "tools/setup.sh", "train"]
    return subprocess.Popen(command, cwd=project, env=set_up.with_packages(), **settings)


def completed(project: Path) -> None:
    """The next set-up completes it, and says nothing that would worry a user."""
    ended = set_up.run(project, set_up.with_packages())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "error" not in ended.stderr.lower()
    assert set_up.is_usable(project)


STOPS = {
    "ctrl-c": lambda process: os.killpg(process.pid, signal.SIGINT),
    "kill": lambda process: os.killpg(process.pid, signal.SIGKILL),
    "kill the script alone": lambda process: process.kill(),  # pip goes on, and keeps the lock
}


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_at_every_second_moment(project, stop):
    """From a new folder each time, after 1, 2, 3 ... twelfths of the time that it takes; then again."""
    began = time.monotonic()
    completed(project)
    step = max(1.0, (time.monotonic() - began) / 12)
    moment, is_stopped = step, True
    while is_stopped:
        shutil.rmtree(project)
        set_up.tiny_project(project)
        process = started(project)
        try:
            process.wait(timeout=moment)
            is_stopped = False
        except subprocess.TimeoutExpired:
            STOPS[stop](process)
            output, words = process.communicate(timeout=60)
            if process.returncode == 0:  # it ended just before it was stopped
                is_stopped = False
            elif stop == "ctrl-c":
                assert process.returncode == 130, output + words
                assert words.endswith("stopped by Ctrl-C. Run the same command again to continue.\n")
        completed(project)
        moment += step
    assert moment > 3 * step


def test_stopped_twice_while_versions_change(project):
    """pip moves the files of the old version away first. Stopped there, neither version is complete."""
    completed(project)
    changed = (project / "pyproject.toml").read_text(encoding="utf-8") + "# another release\n"
    (project / "pyproject.toml").write_text(changed, encoding="utf-8")
    packages = project / set_up.PACKAGES
    (packages / "tiny_one").rename(packages / "~iny_one")
    (packages / "tiny_two/data.txt").write_text("cut", encoding="utf-8")
    (project / ".venv/bin/tiny_two").unlink()
    completed(project)
    assert not list(packages.glob("~*"))


def test_the_network_comes_back(project):
    assert set_up.run(project).stderr == set_up.NO_NETWORK
    completed(project)


@pytest.mark.parametrize("room", ["for pip", "for a package"])
def test_the_disk_gets_room(project, tmp_path, room):
    disk = tmp_path / "disk"
    with set_up.small_disk(disk, megabytes=40):
        project = set_up.tiny_project(disk / "project")
        set_up.make_venv(project)
        if room == "for a package":
            (tmp_path / "pip").mkdir()
            (wheel,) = set_up.tiny_packages().glob("pip-*")
            shutil.copy(wheel, tmp_path / "pip")
            alone = {"PIP_FIND_LINKS": str(tmp_path / "pip")}
            assert set_up.run(project, set_up.with_packages() | alone).returncode == 2
            version = wheel.name.removesuffix("-py3-none-any.whl")
            assert (project / set_up.PACKAGES / f"{version}.dist-info").is_dir()
        filled = disk / "filled"
        with open(filled, "wb") as file:
            free = shutil.disk_usage(disk).free
            file.write(bytes(free - (2**17 if room == "for a package" else 0)))
        ended = set_up.run(project, set_up.with_packages())
        assert ended.returncode == 2
        assert f"error: There is no space left for {project}/.venv" in ended.stderr
        filled.unlink()
        completed(project)


def test_two_at_once(project):
    """One waits for the other, and both end well."""
    both = [started(project), started(project)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    waited = [output for output, _ in outputs if output.startswith("Another set-up is running here")]
    assert len(waited) == 1
    assert set_up.is_usable(project)


def test_the_folder_is_moved(project, tmp_path):
    """The programs of the new folder use nothing of the old one."""
    completed(project)
    project.rename(tmp_path / "moved")
    ended = set_up.run(tmp_path / "moved", set_up.with_packages())
    assert "created in another folder" in ended.stdout
    assert set_up.is_usable(tmp_path / "moved")
    project.symlink_to(tmp_path / "moved")  # it was not moved, only its name changed
    assert set_up.run(project, set_up.with_packages()).stdout == ""


def test_a_file_with_another_hash_is_refused(project, tmp_path):
    """Nothing of it is installed. HASHES=0 checks the version alone."""
    shutil.copytree(set_up.tiny_packages(), tmp_path / "packages")
    set_up.tiny_wheel(tmp_path / "packages", "tiny_two", "2.0", needs="tiny-one")
    variables = set_up.with_packages() | {"PIP_FIND_LINKS": str(tmp_path / "packages")}
    ended = set_up.run(project, variables)
    assert ended.returncode == 2
    assert "tiny_two-2.0-py3-none-any.whl" in ended.stderr
    assert "requirements-hashes.txt does not list a file that pip names above" in ended.stderr
    assert not (project / set_up.PACKAGES / "tiny_two").exists()
    assert set_up.run(project, variables | {"HASHES": "0"}).returncode == 0
    assert set_up.is_usable(project)


INFO = "torch-2.13.0{}.dist-info"


def with_torch(project: Path, place: Path, lists: tuple[str, ...]) -> dict[str, str]:
    """Let the project need a tiny torch: the build for the CPU lies in a folder, the CUDA build in an index.

    lists: the builds whose hashes are in requirements-hashes.txt. Returns the variables for a set-up.
    """
    packages, page = place / "packages", place / "index/torch"
    shutil.copytree(set_up.tiny_packages(), packages)
    page.mkdir(parents=True)
    sums = {}
    for folder, build in ((packages, "+cpu"), (page, "")):
        files = {
            "torch/__init__.py": f"build = '{build}'",
            f"{INFO.format(build)}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0{build}\n",
            f"{INFO.format(build)}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        contents = {name: text.encode() for name, text in files.items()}
        wheel = set_up.write_wheel(folder, "torch", f"2.13.0{build}", contents)
        sums[build] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    link = f'<a href="{wheel.name}#sha256={sums[""]}">{wheel.name}</a>'
    (page / "index.html").write_text(link, encoding="utf-8")
    names = "\n# torch-2.13.0+cpu-py3-none-any.whl" if "+cpu" in lists else ""
    pinned = " ".join(["torch==2.13.0", *(f"--hash=sha256:{sums[build]}" for build in lists)])
    with open(project / "requirements-hashes.txt", "a", encoding="utf-8") as file:
        file.write(f"{names}\n{pinned}\n")
    pyproject = (project / "pyproject.toml").read_text(encoding="utf-8")
    pyproject = pyproject.replace('"tiny-one==1.0"', '"tiny-one==1.0", "torch==2.13.0"')
    (project / "pyproject.toml").write_text(pyproject, encoding="utf-8")
    return set_up.environment(PIP_FIND_LINKS=str(packages), PIP_INDEX_URL=f"file://{page.parent}")


UNLISTED = (
    "warning: the hash of torch-2.13.0+cpu-py3-none-any.whl is not checked, because requirements-hashes.txt "
    "does not list this build.\n"
)


@pytest.mark.parametrize("lists", [("", "+cpu"), ("",)], ids=["listed", "not listed"])
def test_torch_is_the_build_that_pip_prefers_without_hashes(project, tmp_path, lists):
    """A build for the CPU is taken, although an index offers the CUDA build with its hash.

    Without a hash of this build the other packages are checked all the same.
    """
    variables = with_torch(project, tmp_path, lists)
    ended = set_up.run(project, variables)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (project / set_up.PACKAGES / INFO.format("+cpu")).is_dir()
    assert ended.stdout.count(UNLISTED) == ("+cpu" not in lists)
    if "+cpu" not in lists:
        shutil.rmtree(project / ".venv")
        set_up.tiny_wheel(tmp_path / "packages", "tiny_two", "2.0", needs="tiny-one")
        refused = set_up.run(project, variables)
        assert refused.returncode == 2
        assert "does not list a file that pip names above" in refused.stderr
        assert not (project / set_up.PACKAGES / "tiny_two").exists()


def test_a_listed_build_of_torch_with_another_hash_is_refused(project, tmp_path):
    variables = with_torch(project, tmp_path, ("", "+cpu"))
    (wheel,) = (tmp_path / "packages").glob("torch-*")
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("torch/more.py", "")
    ended = set_up.run(project, variables)
    assert ended.returncode == 2
    assert "does not list a file that pip names above" in ended.stderr
    assert not (project / set_up.PACKAGES / "torch").exists()
