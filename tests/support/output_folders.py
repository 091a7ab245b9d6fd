"""Writes a folder in the same way as the tools, in the process of a test or in another one."""

from pathlib import Path

import pytest

from onecard.errors import UserError
from onecard.system import output_folder

FLAG = "--output_path"

MADE_OF = {"program": "test", output_folder.VERSIONS: {}}


def make(target: Path) -> None:
    """Write a folder of two files in the same way as the tools."""
    if not output_folder.is_made(target, MADE_OF, FLAG):
        with output_folder.making(target, 0, MADE_OF, FLAG) as (place, _):
            (place / "model.safetensors").write_bytes(bytes(64))
            (place / "config.json").write_text("{}")


def refused(target: Path, code: int, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        make(target)
    assert caught.value.code == code, caught.value
    assert all(word in str(caught.value) for word in (FLAG, str(target), *words)), caught.value
