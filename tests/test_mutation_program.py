"""What tests/mutation.py decides: which mutants count, which tests run, and when a child is late."""

import ast
import contextlib
import json
import os
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy.exc import OperationalError

from tests import mutation
from tests.support import warm_pytest
from tests.support.paths import ROOT

SOURCE = """\
LIMIT = 3


def one(x: int | None) -> int | None:
    y: int | None = x
    return y


def two():
    return 2
"""


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source.py").write_text(SOURCE)
    return tmp_path / "source.py"


def mutant(line: int) -> SimpleNamespace:
    return SimpleNamespace(start_pos=(line, 4), end_pos=(line, 9))


def test_annotations_are_left_out(source):
    """Those of arguments, results and variables, and nothing else."""
    lines = SOURCE.splitlines()
    texts = [lines[start[0] - 1][start[1] : end[1]] for start, end in mutation.annotations(source)]
    assert texts == ["int | None"] * 3


def test_the_tests_of_a_mutant_are_those_that_run_it(source):
    """Those that run its line; else those of its function; else all. The quickest comes first."""
    tests = {"slow": (9.0, [1, 5, 6]), "quick": (1.0, [1, 6]), "other": (5.0, [1, 10])}
    assert list(mutation.choose(tests, source, mutant(6))) == ["quick", "slow"]
    assert list(mutation.choose(tests, source, mutant(5))) == ["slow"]
    assert list(mutation.choose(tests, source, mutant(10))) == ["other"]
    assert list(mutation.choose({"slow": tests["slow"]}, source, mutant(10))) == ["slow"]
    assert list(mutation.choose({name: (9.0, [6]) for name in "ab"}, source, mutant(5))) == ["a", "b"]


def test_no_mutant_runs_tests_for_ever(source):
    tests = {str(number): (mutation.MOST / 4, [6]) for number in range(9)}
    assert len(mutation.choose(tests, source, mutant(6))) == 4


def test_only_failing_tests_kill_a_mutant():
    """pytest's own errors, no tests at all and an error of the child say nothing about the mutant."""
    assert [mutation.judged(code) for code in (1, 2, None, -11)] == [True] * 4
    assert mutation.judged(0) is False
    assert [mutation.judged(code) for code in (3, 4, 5, 99)] == [None] * 4


def test_a_file_is_judged_only_when_its_tests_pass_without_a_mutant(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    tests = {f"tests/test_it.py::test_{name}": (0.1, [1]) for name in ("good", "bad", "gone")}
    assert mutation.passes(tmp_path, {name: tests[name] for name in list(tests)[:1]})
    assert not mutation.passes(tmp_path, tests)
    assert not mutation.passes(tmp_path, {name: tests[name] for name in list(tests)[2:]})


@pytest.mark.parametrize("code", [0, 1, 5])
def test_the_exit_code_and_output_of_a_child(tmp_path, code):
    def work() -> int:
        os.write(1, f"in {Path.cwd()}".encode())
        return code

    assert warm_pytest.in_child(tmp_path, 30, work) == (code, f"in {tmp_path}")


def test_a_child_that_does_not_end_is_late(tmp_path, monkeypatch):
    """It may compute for so many seconds, or wait for longer; its own children end with it."""

    def compute() -> int:
        while True:
            pass

    def wait() -> int:
        if os.fork() == 0:
            (tmp_path / "child").write_text(str(os.getpid()))
        time.sleep(600)
        return 0

    assert warm_pytest.in_child(tmp_path, 1, compute)[0] is None
    monkeypatch.setattr(warm_pytest, "WAITING", 1)
    assert warm_pytest.in_child(tmp_path, 10, wait)[0] is None
    pid = int((tmp_path / "child").read_text())
    for _ in range(100):  # the system takes a moment
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or ") Z " in status.read_text(encoding="utf-8"):
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a late child is still there")


def test_every_file_is_there():
    for name, tests in mutation.FILES.items():
        ast.parse((ROOT / "onecard" / f"{name}.py").read_text(encoding="utf-8"))
        assert all((ROOT / "tests" / test).is_file() for test in tests)


def test_the_lines_that_each_test_runs_are_recorded(tmp_path):
    """Those of a fixture count for each test that uses it, and a test that fails is left out."""
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_source.py").write_text(
        "import sys\n"
        "import pytest\n"
        "import source\n"
        "@pytest.fixture(scope='module')\n"
        "def prepared(): return source.one(3)\n"
        "def test_first(prepared): assert prepared == 3\n"
        "def test_second(prepared): sys.settrace(None)\n"
        "def test_third(): assert source.two() == 2\n"
        "def test_wrong(): assert source.two() == 3\n"
    )

    def work() -> int:
        tests = warm_pytest.survey(tmp_path / "source.py", ["test_source.py"])
        lines = {name.split("::")[1]: lines for name, (_, lines) in tests.items()}
        (tmp_path / "lines.json").write_text(json.dumps(lines))
        return 0

    code, output = warm_pytest.in_child(tmp_path, 60, work)
    assert code == 0, output
    lines = json.loads((tmp_path / "lines.json").read_text(encoding="utf-8"))
    assert {name: sorted({*each} & {6, 10}) for name, each in lines.items()} == {
        "test_first": [6],
        "test_second": [6],
        "test_third": [10],
    }


def test_a_session_that_another_process_has_locked_is_waited_for(tmp_path, monkeypatch):
    """Two processes record results, and a third may read them meanwhile."""
    recorded, locked = [], [True, True]

    @contextlib.contextmanager
    def use_db(path: Path):
        if locked:
            locked.pop()
            raise OperationalError("insert", {}, Exception("database is locked"))
        yield types.SimpleNamespace(set_result=lambda *pair: recorded.append(pair))

    monkeypatch.setitem(sys.modules, "cosmic_ray", types.ModuleType("cosmic_ray"))
    monkeypatch.setitem(sys.modules, "cosmic_ray.work_db", types.SimpleNamespace(use_db=use_db))
    mutation.record(tmp_path, "job", "killed")
    assert recorded == [("job", "killed")]
