"""Files that comments, docstrings and the docs name are there, under that name."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

FOLDERS = ("onecard", "tests", "tools", "benchmarks", "sample", "docs")
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STRANGERS = ("modeling_x.py",)  # of a model that brings code
NAMED = re.compile(r"(?<![\w/.<>-])(?:[\w-]+/)*[\w-]+\.py\b")


def sources() -> dict[str, str]:
    """Path of every Python file, from the root -> its text."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted(paths)}


def prose(source: str) -> Iterator[str]:
    """The comments and docstrings of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def missing(text: str, known: set[str]) -> list[str]:
    """The .py files that a text names and that are not there."""
    return [
        name for name in NAMED.findall(text) if not any(f"/{path}".endswith(f"/{name}") for path in known)
    ]


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every way to name a file that is there: from the root, or from any folder on the way to it."""
    parts = [path.split("/") for path in sources()]
    return {*STRANGERS, *("/".join(each[start:]) for each in parts for start in range(len(each)))}


def test_names_in_the_code(known):
    wrong = {path: missing("\n".join(prose(source)), known) for path, source in sources().items()}
    assert {path: names for path, names in wrong.items() if names} == {}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_in_the_docs(path, known):
    assert missing(path.read_text(encoding="utf-8"), known) == []


def test_a_stale_name_is_found(known):
    assert missing("See frozen.py, models/loss.py, loss.py and training/loss.py.", known) == [
        "frozen.py",
        "training/loss.py",
    ]
    assert missing("\n".join(prose('"""As nowhere.py."""\n# and other.py\nx = "no.py"\n')), known) == [
        "nowhere.py",
        "other.py",
    ]
