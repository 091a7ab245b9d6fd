"""Errors: the remedy that a caller adds, and the line of an error or a child process that is shown."""

import re

import pytest

from onecard import errors
from onecard.errors import UserError
from tests.support.rooms import library

CUT = re.compile(
    r"""splitlines\(\)[^\n]*\[(0|-1)\]|split\("\\n"(, 1)?\)\[(0|-1)\]|r?partition\("\\n"\)\[(0|2)\]"""
)


def test_the_innermost_caller_says_what_to_do():
    """An error without a remedy gets that of the innermost caller; an error with a remedy keeps it."""
    with pytest.raises(UserError) as raised, errors.remedy("Outer."), errors.remedy("Use --device cpu."):
        raise UserError("There is no GPU.", code=errors.MEMORY)
    assert str(raised.value) == "There is no GPU. Use --device cpu."
    assert raised.value.code == errors.MEMORY
    with pytest.raises(UserError) as raised, errors.remedy("Use --device cpu."):
        raise UserError("It is damaged.", "Fetch it again.")
    assert str(raised.value) == "It is damaged. Fetch it again."


def test_another_way_stands_behind_the_remedy():
    with pytest.raises(UserError) as raised, errors.remedy("Use --device cpu.", beside=True):
        raise UserError("torch cannot use the GPU.", "Update the driver.")
    assert raised.value.fix == "Update the driver. Or use --device cpu."
    with pytest.raises(UserError) as raised, errors.remedy("Use --device cpu.", beside=True):
        raise UserError("There is no GPU.")
    assert raised.value.fix == "Use --device cpu."


def test_other_errors_pass_unchanged():
    with pytest.raises(ValueError, match="odd"), errors.remedy("Use --device cpu."):
        raise ValueError("odd")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one"), "one"),
        (ValueError("\n  one \ntwo"), "one "),
        (ValueError("one\r\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("name"), "'name'"),
        (ValueError("x" * 999), "x" * 200),
    ],
)
def test_first_line_of_an_error(error, line):
    assert errors.first_line(error) == line


@pytest.mark.parametrize(
    ("output", "line"),
    [("", "silent"), (" \n", "silent"), ("one\ntwo\n\n", "two"), ("one", "one"), ("x" * 999, "x" * 300)],
)
def test_last_line_of_a_child(output, line):
    assert errors.last_line(output, "silent") == line


def test_lines_are_cut_in_one_place():
    """No other module takes the first or last line of an error by itself."""
    places = [
        f"{module}: {match[0]}"
        for module, source in library().items()
        if module not in ("errors", "ui.terminal_io", "data.json_rows")  # these cut texts, not errors
        for match in CUT.finditer(source)
    ]
    assert places == []
    planted = ["str(e).strip().splitlines()[0]", '(s.splitlines() or ["x"])[-1]', 't.split("\\n")[0]']
    assert all(CUT.search(text) for text in planted)
    assert CUT.search('str(e).partition("\\n")[0]')
