"""In continuous integration a test that lacks a package fails; what the machine cannot run is skipped."""

import os
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

TESTS = """import pytest, sys

@pytest.mark.skipif(True, reason="needs strace (Debian package strace)")
def test_of_a_program(): ...

def test_of_a_package():
    pytest.importorskip("no_such_package")

@pytest.fixture
def browser():
    pytest.skip("no Chromium: apt install chromium")

def test_of_a_fixture(browser): ...

@pytest.mark.skipif(True, reason="needs a CUDA GPU")
def test_of_a_gpu(): ...

def test_of_a_mount():
    pytest.skip("no mounts of one's own here")

@pytest.mark.xfail
def test_that_fails():
    raise ValueError
"""


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, "6 skipped, 1 xfailed"),
        ({"ONECARD_NO_SKIPS": "1"}, "1 failed, 2 skipped, 1 xfailed, 3 errors"),
    ],
)
def test_only_the_machine_may_skip_tests(changes, counts, tmp_path):
    (tmp_path / "test_some.py").write_text(TESTS, encoding="utf-8")
    (tmp_path / "test_module.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "ONECARD"))
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.support.skips", "--continue-on-collection-errors"]
    ended = subprocess.run(
        [*command, "-c", os.devnull, "-p", "no:cacheprovider", "-rs", f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=ROOT,
        env={**inherited, **changes},
        capture_output=True,
        text=True,
        check=False,
    )
    assert counts in ended.stdout.splitlines()[-1], ended.stdout + ended.stderr


def test_continuous_integration_allows_no_skips():
    assert "export ONECARD_NO_SKIPS=1\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
