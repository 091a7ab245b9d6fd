"""Lists of names of options in the source, outside of the declarations.

python -m tests.support.option_lists   # prints those of onecard/

A new option would have to be added to each of them, and nothing would fail where it is missing. So facts
about an option are declared with it, and config/declaration.py gives the names of the options with a fact.
"""

import ast
import functools
import importlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from onecard.__main__ import PROGRAMS
from onecard.config.declaration import declared
from tests.support.paths import ROOT


class Found(NamedTuple):
    """A list of names of options."""

    file: str  # from the root of the checkout
    line: int
    names: tuple[str, ...]  # sorted


@functools.cache
def settings() -> set[frozenset[str]]:
    """The names of the options of each program."""
    modules = [importlib.import_module(f"onecard.programs.{file}") for file, _ in PROGRAMS.values()]
    return {frozenset(declared(module.SETTINGS)) for module in modules}


def of_project() -> list[Found]:
    """All lists in onecard/, apart from the classes in config/ that declare options."""
    paths = sorted((ROOT / "onecard").rglob("*.py"))
    return [
        option_list
        for path in paths
        for option_list in lists(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def lists(source: str, file: str = "") -> Iterator[Found]:
    """The lists in a Python file with two or more options of a program, which are at least half of it."""
    tree = ast.parse(source)
    later = {id(branch) for node in ast.walk(tree) if isinstance(node, ast.If) for branch in node.orelse[:1]}
    for node in ast.walk(tree):
        if id(node) not in later:  # an elif belongs to the chain that begins above
            texts = [text for text in elements(node) if text is not None]
            names = max((options & set(texts) for options in settings()), key=len)
            if len(names) > 1 and 2 * len(names) >= len(elements(node)):
                yield Found(file, node.lineno, tuple(sorted(names)))


def elements(node: ast.AST) -> list[str | None]:
    """The elements, keys or compared values of a node like a list; None for each that is not a text."""
    match node:
        case ast.Tuple(elts=nodes) | ast.List(elts=nodes) | ast.Set(elts=nodes):
            return [
                text
                for each in nodes
                for text in (elements(each.value) if isinstance(each, ast.Starred) else [constant(each)])
            ]
        case ast.Dict(keys=keys):
            return [constant(key) for key in keys]
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            return [keyword.arg for keyword in keywords]
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str(text)), attr="split"), args=args):
            separators = [constant(arg) for arg in args[:1]]
            return [*text.split(*separators)]
        case ast.BinOp(left=left, op=ast.Add() | ast.BitOr(), right=right):
            return [*elements(left), *elements(right)]
        case ast.BoolOp(values=values):
            return list(itertools.chain.from_iterable(map(compared, values)))
        case ast.If():
            return chain(node)
        case ast.Match(cases=cases):
            return [
                text
                for case in cases
                for part in ast.walk(case.pattern)
                if isinstance(part, ast.MatchValue)
                for text in [constant(part.value)]
            ]
    return []


def chain(node: ast.If) -> list[str | None]:
    """The texts with which a chain of if and elif compares."""
    rest = node.orelse[0] if len(node.orelse) == 1 else None
    return [*compared(node.test), *(chain(rest) if isinstance(rest, ast.If) else [])]


def compared(test: ast.expr) -> list[str | None]:
    """The texts in comparisons such as `name == "text"` and `"text" in names`."""
    sides = [test.left, *test.comparators] if isinstance(test, ast.Compare) else []
    return [text for text in map(constant, sides) if text is not None]


def constant(node: ast.expr | None) -> str | None:
    """The text of a node that is a constant text, otherwise None."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


if __name__ == "__main__":
    for found in of_project():
        print(f"{found.file}:{found.line}: {', '.join(found.names)}")
