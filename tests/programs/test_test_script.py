"""test.sh checks the types before all tests, and a wrong type stops them."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PYTHON = """#!/usr/bin/env bash
echo "$*" >> called
[ "$*" != "-m mypy" ] || exit "$(cat mypy-code)"
"""


@pytest.mark.parametrize(
    ("arguments", "code", "called"),
    [
        ([], 0, ["-m mypy", "-m pytest -n 2"]),
        (["--ci"], 0, ["-m mypy", "-m pytest -n 2"]),
        ([], 1, ["-m mypy"]),
        (["tests/data"], 1, ["-m pytest tests/data"]),
    ],
    ids=["right types", "both tiers", "a wrong type", "some tests only"],
)
def test_types_come_first(tmp_path: Path, arguments, code, called):
    """A stand-in for .venv/bin/python records its calls, and nothing has to be set up."""
    shutil.copy(ROOT / "test.sh", tmp_path)
    for name, source in (("tools/setup.sh", ""), (".venv/bin/python", PYTHON)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(source)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "mypy-code").write_text(str(code))
    ended = subprocess.run(["bash", str(tmp_path / "test.sh"), *arguments], check=False)
    noted = (tmp_path / "called").read_text().splitlines()
    assert len(noted) == len(called)
    assert all(line.startswith(start) for line, start in zip(noted, called, strict=True)), noted
    assert all(line.endswith("-m not slow") == (arguments == ["--ci"]) for line in noted if "pytest" in line)
    assert ended.returncode == (0 if "-m pytest" in noted[-1] else code)
