"""Environments like those of a newcomer, with only the packages that parts of tools/setup.sh install.

The packages are links into the environment that runs the tests, so that an environment is made in a second.
Their metadata says which further packages they need. A folder that several distributions share (google) is
linked as a whole.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SETS_UP = re.compile(r"bash tools/setup\.sh (\w+)")
ALWAYS = ("pip",)  # tools/setup.sh itself installs this
WITH = {  # stamp files of each part
    "train": ["train"],
    "chat": ["chat", "train"],
    "cpu": ["cpu", "train"],
    "serve": ["serve", "cpu", "train"],
}


def copy_project(folder: Path) -> Path:
    """The project's files in a new folder, without an environment."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def closure(extras: Iterable[str]) -> set[str]:
    """The names of all distributions that these extras of pyproject.toml need."""
    pending = [Requirement(f"onecard[{','.join(extras)}]")]
    seen: set[tuple[str, str]] = set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in _needs(name, extra):
                need = Requirement(line)
                if need.marker is None or need.marker.evaluate({"extra": extra}):
                    pending.append(need)
    return {name for name, _ in seen} - {"onecard"}


def _needs(name: str, extra: str) -> list[str]:
    """The requirements of a distribution; onecard's own are those of this pyproject.toml."""
    if name == "onecard":
        return PYPROJECT["optional-dependencies"].get(extra, PYPROJECT["dependencies"])
    return importlib.metadata.requires(name) or []


def of_a_newcomer() -> dict[str, str]:
    """The environment variables of this process without those for Python, for a hub and for wandb."""
    hidden = ("HF_", "WANDB", "PYTHON", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


class Environment:
    """A virtual environment with pip, and with the packages that are linked into it."""

    def __init__(self, folder: Path):
        self.bin = folder / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        prefixes = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "posix_prefix", prefixes))
        self.link(ALWAYS)

    def link(self, names: Iterable[str]) -> None:
        """Add these distributions, as links to their files in the environment that runs the tests."""
        for name in names:
            distribution = importlib.metadata.distribution(name)
            source = Path(distribution.locate_file(""))
            tops = {path.parts[0] for path in distribution.files or [] if ".." not in path.parts}
            for top in tops - {"__pycache__"}:
                if not top.endswith(".pth"):  # such files would change the start of Python
                    self._link(source / top, self.packages / top)

    def _link(self, source: Path, target: Path) -> None:
        if source.exists() and not target.exists():
            target.symlink_to(source)


class Newcomer(Environment):
    """A copy of the project to whose .venv the commands add packages."""

    def __init__(self, folder: Path):
        self.folder = copy_project(folder)
        super().__init__(self.folder / ".venv")

    def set_up(self, part: str) -> None:
        """Add the packages and stamp files of `bash tools/setup.sh PART`."""
        self.link(closure([part]))
        script = 'cat requirements.txt pyproject.toml | cksum | cut -d" " -f1'
        summed = subprocess.run(
            ["bash", "-c", script], cwd=self.folder, capture_output=True, text=True, check=True
        )
        for each in WITH[part]:
            (self.folder / ".venv" / f"onecard-{each}-{summed.stdout.strip()}").touch()

    def parts_of(self, command: str) -> list[str]:
        """The parts that a command of README.md sets up, directly or in its script."""
        parts = SETS_UP.findall(command)
        for name in re.findall(r"bash (\w+\.sh)", command):
            parts += SETS_UP.findall((self.folder / name).read_text(encoding="utf-8"))
        return parts

    def run(self, command: str, timeout: float = 1200) -> subprocess.CompletedProcess:
        """Run a command as a newcomer types it, after adding the packages that it sets up."""
        for part in self.parts_of(command):
            self.set_up(part)
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=of_a_newcomer(),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
