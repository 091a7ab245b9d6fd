"""Every sample file trains with one command, and a golden file holds what the model sees of its first row."""

import json
from pathlib import Path

import pytest

from onecard.data import reader
from onecard.data.reader import RowFile
from onecard.errors import UserError
from onecard.hub import locate
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import folder as runs_folder
from tests.support import golden_tokens
from tests.support.golden_tokens import SAMPLES
from tests.support.harness import Harness
from tests.support.paths import ROOT
from tests.support.small_runs import fall

FLAGS = {
    "bits": 16,
    "dtype": "fp32",
    "device": "cpu",
    "batch_size": 4,
    "max_steps": 14,
    "learning_rate": 2e-2,
    "test_size": 4,
    "lora_target_modules": "all-linear",
    "save_steps": 100,
}


def test_one_command_trains_on_each_sample_file(harness, tiny_model, tmp_path):
    """Some but not all tokens are targets, and the loss falls below 0.8 of its start."""
    harness.map(lambda path: train_on(path, harness, tiny_model, tmp_path / path.name), SAMPLES)


def train_on(path: Path, harness: Harness, tiny_model: Path, run: Path) -> None:
    answer = harness.run(
        "finetune",
        {**FLAGS, "model_path": tiny_model, "data_path": path, "output_path": run, "cutoff_len": 500},
    )
    assert answer["code"] == 0, answer["said"]
    records = [json.loads(line) for line in (run / runs_folder.LOG).read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert len(steps) == FLAGS["max_steps"]
    assert all(0 < record["target_tokens"] < record["tokens"] for record in steps)
    assert fall(run) < 0.8, path


@pytest.mark.slow
@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_the_demo_model_learns_from_each_sample_file(harness, tmp_path, path):
    """The same is done with the real model in 8 bits, with defaults otherwise."""
    run = tmp_path / "run"
    flags = {"model_path": locate.locate("demo"), "data_path": path, "output_path": run, "batch_size": 4}
    answer = harness.run(
        "finetune",
        {
            **flags,
            "max_steps": 20,
            "learning_rate": 3e-3,
            "lora_target_modules": "all-linear",
            "test_size": 0,
            "warmup_steps": 0,
        },
    )
    assert answer["code"] == 0, answer["said"]
    assert fall(run) < 0.8


def test_what_the_model_sees_is_written_down():
    """The golden file has ids, targets and text of a row of every schema in every template."""
    dump = golden_tokens.dump(models_tokenizer.load_tokenizer(locate.locate("demo")))
    assert dump == json.loads(golden_tokens.FILE.read_text(encoding="utf-8"))


def test_the_samples_are_found_from_any_folder(tmp_path, monkeypatch):
    """They have the name of the documentation, also with a weight; the user's own files come first."""
    monkeypatch.chdir(tmp_path)
    assert reader.locate_files("sample/chat.jsonl:2") == [RowFile(ROOT / "sample" / "chat.jsonl", 2.0)]
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "chat.jsonl").write_text("{}\n", encoding="utf-8")
    assert reader.locate_files("sample/chat.jsonl") == [RowFile(Path("sample/chat.jsonl"))]
    for name in ("sample/nothing.jsonl", "sample/../pyproject.json", "docs/chat.jsonl", "chat.jsonl"):
        with pytest.raises(UserError, match="no such file"):
            reader.locate_files(name)
