"""Where nothing may be missing (ONECARD_NO_SKIPS=1, as in .ci/run), a skipped test fails.

Otherwise a package that could not be installed would silently take its tests away. What depends on the
machine may be skipped; -rs lists it at the end. These are hooks of pytest, which tests/conftest.py imports.
"""

import os
import re
from collections.abc import Generator

import pytest

VARIABLE = "ONECARD_NO_SKIPS"
OF_THE_MACHINE = re.compile(
    "needs a CUDA GPU|needs a torch that sees no card|needs Linux|brings no GNU OpenMP"
    "|mounting a small disk is not allowed here|no mounts of one's own here"
    "|git is not installed|commit \\w+ is not in this clone|which would make another"
    # the tests that need gptqmodel run in .venv/gptq, started by one that fails without it
    "|needs gptqmodel, which .venv/gptq has$|gptqmodel is here: they run by themselves"
)


def _judge(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Let a report of a skip that is not allowed be one of a failure."""
    if VARIABLE in os.environ and report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not OF_THE_MACHINE.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, although {VARIABLE} is set: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _judge(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _judge(report)
    return report
