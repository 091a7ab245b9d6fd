"""docs/options.md is what docs/options.py prints, and shows every option of every program."""

import dataclasses
import re

import pytest

from docs import options as option_page
from onecard.__main__ import PROGRAMS
from onecard.config.declaration import Place, Use, declared, learned, option
from onecard.config.training import FinetuneConfig
from tests.support.paths import ROOT


def test_the_page_is_up_to_date():
    """`.venv/bin/python -m docs.options > docs/options.md` writes it again."""
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == option_page.page()


@pytest.mark.parametrize("command", PROGRAMS)
def test_every_option_of_a_program_is_on_the_page(command):
    """It is in the program's own section, or in the section to which that one refers."""
    sections = dict(re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", option_page.page(), re.MULTILINE | re.DOTALL))
    section = sections[command]
    referred = re.search(r"those of \[([\w-]+)\]", section)
    text = section + (sections[referred[1]] if referred else "")
    assert [
        name for name in declared(option_page.settings_of(command)) if f"| `--{name}` |" not in text
    ] == []


def test_a_new_option_is_in_the_table():
    """The table has its default, values, help, uses and role, and for training all rules."""

    @dataclasses.dataclass(frozen=True)
    class Imaginary:
        shade: str = option(
            "red|blue",
            "execution",
            "which <shade> is used",
            choices=("red|blue", "green"),
            only=(Use(("only for sampling", "")),),
        )

    @dataclasses.dataclass(frozen=True)
    class ImaginaryTraining(FinetuneConfig):
        depth: int = learned(
            3,
            ("Depth", "深度"),
            ("how deep it goes", "多深"),
            changes_rows=False,
            fixed_for_other_rows=True,
            place=Place.COMMON,
        )

    lines = option_page.table("merge", Imaginary, ["shade"]).splitlines()
    assert lines[1:] == [
        "| option | default | values | what it is | role |",
        "| --- | --- | --- | --- | --- |",
        r"| `--shade` | red\|blue | red\|blue, green | which \<shade\> is used; it is only for sampling "
        "| execution |",
    ]
    row = option_page.table("finetune", ImaginaryTraining, ["depth"]).splitlines()[-1]
    assert row == (
        "| `--depth` | 3 | a number | how deep it goes | learned | at once | stays as it was "
        "| stays as it was |"
    )
