"""What the tests of tools/setup.sh share: copies of the project, environments in any state, tiny packages.

The real script always runs in a copy of the project. No package index can be reached. With the packages of
`tiny_packages` a whole set-up takes seconds and needs none.
"""

import atexit
import base64
import contextlib
import functools
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PYTHON = Path(os.path.realpath(sys.executable))
NO_INDEX = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
NO_NETWORK = (
    "error: The network did not let pip reach a package index. Check the network, and your proxy and "
    "PIP_INDEX_URL if you use them. Then run the same command again.\n"
)
PACKAGES = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": ".venv"}))
PINNED = ("requirements.txt", "requirements-cuda.txt", "requirements-hashes.txt")
SCRIPTS = ("finetune.sh", "tools/setup.sh", "tools/launch.sh")
PYPROJECT = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "onecard"
version = "0.1.0"
[project.optional-dependencies]
train = ["tiny-one==1.0"]
[tool.setuptools]
py-modules = ["onecard"]
"""
WHOLE = "import onecard, tiny_one, tiny_two; print(onecard.__file__, tiny_one.VALUE + tiny_two.VALUE)"


def copy_project(folder: Path) -> Path:
    """The files that the set-up reads, in a folder."""
    (folder / "tools").mkdir(parents=True)
    for name in (*SCRIPTS, *PINNED, "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def tiny_project(folder: Path) -> Path:
    """A project whose part `train` needs two tiny packages, with the real scripts and a program."""
    (folder / "tools").mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(ROOT / name, folder / name)
    versions = [path.name.split("-")[:2] for path in sorted(tiny_packages().iterdir())]
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(tiny_packages().iterdir())]
    lines = [f"{name}=={version}" for name, version in versions]
    listed = [f"{line} \\\n    --hash=sha256:{each}" for line, each in zip(lines, hashes, strict=True)]
    for name, content in zip(PINNED, (lines, [], listed), strict=True):
        (folder / name).write_text("\n".join(content), encoding="utf-8")
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    (folder / "onecard.py").touch()
    (folder / "finetune.py").write_text(WHOLE, encoding="utf-8")
    return folder


def write_wheel(folder: Path, name: str, version: str, files: Mapping[str, bytes]) -> Path:
    """A wheel for any machine with these files; those of its metadata begin with NAME-VERSION.dist-info."""
    info = f"{name}-{version}.dist-info"
    rows = []
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            rows.append(f"{file},sha256={digest},{len(content)}\n")
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", "".join([*rows, f"{info}/RECORD,,\n"]))
    return path


def tiny_wheel(folder: Path, name: str, version: str, needs: str = "") -> Path:
    """A wheel with one module and one program, which needs at most one other package."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"VALUE = {version}\nmain = lambda: print(VALUE)\n",
        f"{name}/data.txt": "x" * 100_000,
        f"{info}/METADATA": metadata + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    return write_wheel(folder, name, version, {path: text.encode() for path, text in files.items()})


def installed_wheel(folder: Path, name: str) -> Path:
    """A wheel of a package without compiled parts that the environment of the tests has."""
    distribution = importlib.metadata.distribution(name)
    later = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")  # what pip adds
    files = {
        str(path): Path(distribution.locate_file(path)).read_bytes()
        for path in distribution.files or []
        if ".." not in path.parts and path.suffix != ".pyc" and path.name not in later
    }
    return write_wheel(folder, name, distribution.version, files)


@functools.cache
def tiny_packages() -> Path:
    """A folder with wheels of all packages that a set-up of the tiny project installs, pip among them."""
    folder = _until_the_end("onecard-wheels-")
    for name in ("pip", "setuptools"):
        installed_wheel(folder, name)
    tiny_wheel(folder, "tiny_one", "1.0", needs="tiny-two")
    tiny_wheel(folder, "tiny_two", "2.0")
    return folder


def environment(python: Path = PYTHON, **changes: str) -> dict[str, str]:
    """The variables for a set-up that reaches no package index."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "VIRTUAL"))
    }
    return {**inherited, **NO_INDEX, "PYTHON": str(python), **changes}


def with_packages() -> dict[str, str]:
    """The variables for a set-up that has the packages of `tiny_packages`."""
    return environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tiny_packages()))


def run(
    project: Path, variables: Mapping[str, str] | None = None, part: str = "train"
) -> subprocess.CompletedProcess:
    """A set-up that runs to its end."""
    command = ["bash", str(project / "tools/setup.sh"), part]
    settings = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, cwd=project, env=variables or environment(), **settings)


@functools.cache
def whole_venv() -> Path:
    """An environment with pip, which is made once because installing pip takes seconds."""
    folder = _until_the_end("onecard-venv-")
    subprocess.run([PYTHON, "-m", "venv", folder], check=True)
    return folder


def make_venv(project: Path, pip: bool = True) -> None:
    """Give the project an environment that looks as if it was created there."""
    if not pip:
        subprocess.run([PYTHON, "-m", "venv", "--without-pip", ".venv"], cwd=project, check=True)
        return
    shutil.copytree(whole_venv(), project / ".venv", symlinks=True)
    settings = project / ".venv/pyvenv.cfg"
    text = settings.read_text(encoding="utf-8").replace(str(whole_venv()), str(project / ".venv"))
    settings.write_text(text, encoding="utf-8")


def mark_complete(project: Path) -> Path:
    """Write the stamp that a set-up of `train` writes last."""
    script = 'echo ".venv/onecard-train-$(cat requirements.txt pyproject.toml | cksum | cut -d" " -f1)"'
    named = subprocess.run(["bash", "-c", script], cwd=project, capture_output=True, text=True, check=True)
    stamp = project / named.stdout.strip()
    stamp.parent.mkdir(exist_ok=True)
    stamp.touch()
    return stamp


def pip_runs(project: Path) -> bool:
    """Whether pip of the environment can say which packages there are."""
    listed = subprocess.run(
        [project / ".venv/bin/python", "-m", "pip", "list"], capture_output=True, text=True
    )
    return listed.returncode == 0 and "pip " in listed.stdout


def is_usable(project: Path) -> bool:
    """Whether the tiny project's program runs through its entry, and those of its packages by themselves."""
    settings = {"cwd": project, "env": environment(), "capture_output": True, "text": True}
    used = subprocess.run(["bash", "finetune.sh"], **settings)
    programs = [
        subprocess.run([project / ".venv/bin" / name], **settings) for name in ("tiny_one", "tiny_two")
    ]
    return (
        (used.returncode, used.stderr) == (0, "")
        and used.stdout == f"{project / 'onecard.py'} 3.0\n"  # and nothing is set up again
        and [each.stdout for each in programs] == ["1.0\n", "2.0\n"]
        and pip_runs(project)
        and subprocess.run([project / ".venv/bin/pip", "check"], **settings).returncode == 0
    )


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of this size at the folder; where mounting is not allowed, the test is skipped."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "onecard", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def script(path: Path, text: str) -> Path:
    """An executable file for bash."""
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def _until_the_end(prefix: str) -> Path:
    """A temporary folder that is removed when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
