"""A3: the service compares nothing that is secret with an operator that stops at the first difference."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

FILES = sorted((ROOT / "onecard/serving").rglob("*.py"))
SECRET = re.compile(r"secret|digest|password|bearer|authori[sz]ation|api_?key|token_of", re.IGNORECASE)
OPERATORS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
METHODS = ("startswith", "endswith", "__eq__", "__contains__", "index", "find", "count")


def secret_names(node: ast.AST) -> list[str]:
    """The names of secrets in an expression; what a call makes of them, such as a length, is none."""
    if isinstance(node, ast.Call):
        return []
    names = [getattr(node, "id", ""), getattr(node, "attr", "")]
    key = getattr(node, "slice", None)  # headers["authorization"]; the word alone is no secret
    names += [key.value] if isinstance(key, ast.Constant) and isinstance(key.value, str) else []
    inner = [name for child in ast.iter_child_nodes(node) for name in secret_names(child)]
    return [name for name in names if SECRET.search(name)] + inner


def comparisons(source: str) -> Iterator[str]:
    """The comparisons of secrets in a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(isinstance(each, OPERATORS) for each in node.ops):
            operands = [node.left, *node.comparators]
            is_class = [isinstance(each, ast.Name) and each.id[:1].isupper() for each in operands]
            if any(
                secret_names(each) for each, skipped in zip(operands, is_class, strict=True) if not skipped
            ):
                yield ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_compared = node.func.attr in METHODS and secret_names(node.func.value)
            if is_compared:
                yield ast.unparse(node)
        if isinstance(node, ast.Match) and secret_names(node.subject):
            yield ast.unparse(node.subject)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "onecard").as_posix())
def test_no_secret_is_compared(path):
    assert list(comparisons(path.read_text(encoding="utf-8"))) == []


def test_the_rule_reads_the_file_that_looks_keys_up():
    """It uses the name that the rule looks for, and compares in constant time."""
    source = (ROOT / "onecard/serving/keys.py").read_text(encoding="utf-8")
    assert "hmac.compare_digest(digest" in source
    assert len(FILES) > 5


@pytest.mark.parametrize(
    "line",
    [
        "secret == other",
        "row.digest != digest",
        "KEYS.c.digest == text",
        "secret in known",
        "key.secret not in known",
        "other == self.api_key",
        "headers['authorization'] == text",
        "secret.startswith('oc-')",
        "secret[3:] == text",
        "match secret:\n    case 'a':\n        pass",
        "f'{secret}' == text",
    ],
)
def test_a_planted_comparison_is_found(line):
    assert list(comparisons(line))


@pytest.mark.parametrize(
    "line",
    ["len(secret) > 200", "secret is None", "hmac.compare_digest(secret, b)", "name == 'authorization'"],
)
def test_what_does_not_compare_contents_is_let_through(line):
    assert not list(comparisons(line))
