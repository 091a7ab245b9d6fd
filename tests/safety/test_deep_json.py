"""A JSON file with too many brackets is refused like any damaged file: Python has an error of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard.config import options as config_options
from onecard.config.training import FinetuneConfig
from onecard.conversion import gguf, llama_cpp_converter
from onecard.errors import UserError
from onecard.hub import listing, model_files
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy
from onecard.runs import log as runs_log
from onecard.system import files as system_files
from onecard.system import output_folder

DEEP = "[" * 100_000 + "\n"
REFUSING: dict[str, Callable[[Path], object]] = {  # name of a file -> what reads it in the folder
    "options.json": lambda folder: config_options.parse_given(
        FinetuneConfig, [f"--config={folder / 'options.json'}"]
    ),
    "adapter_config.json": gguf.check_adapter,
    model_files.INDEX: model_files.files_of,
    runs_checkpoint.MANIFEST: runs_checkpoint.verify,
    runs_checkpoint.PROGRESS: runs_checkpoint.read_progress,
    "config.json": lambda folder: system_files.read_json(folder / "config.json"),
    "trainer_state.json": lambda folder: legacy._json(folder / "trainer_state.json"),
}
PASSING: dict[str, tuple[Callable[[Path], object], object]] = {  # the same, and what the reader says
    "tokenizer.json": (lambda folder: llama_cpp_converter.pretokenizer(folder / "tokenizer.json"), None),
    runs_folder.CONFIG: (runs_folder.trained_all, False),
    runs_folder.FINISHED: (runs_log.samples, {}),
    "answer of a hub": (lambda folder: listing._json((folder / "answer of a hub").read_bytes()), None),
}


def test_so_many_brackets_are_an_error_of_their_own():
    with pytest.raises(RecursionError):
        json.loads(DEEP)


@pytest.mark.parametrize("name", REFUSING)
def test_a_deep_file_is_refused(name, tmp_path):
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(UserError, match=str(tmp_path)):
        REFUSING[name](tmp_path)


@pytest.mark.parametrize("name", PASSING)
def test_a_deep_file_is_passed_over_where_damaged_ones_are(name, tmp_path):
    (tmp_path / name).write_text(DEEP)
    read, result = PASSING[name]
    assert read(tmp_path) == result


def test_a_folder_whose_record_is_deep_is_no_output_of_ours(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / output_folder.RECORD).write_text(DEEP)
    with pytest.raises(UserError, match="made"):
        output_folder.is_made(tmp_path / "made", {"files": {}}, "--output_path")
