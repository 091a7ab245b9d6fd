"""What log.jsonl and samples.jsonl of a run say while they are written, when a line may be incomplete."""

import json
from pathlib import Path

import pytest

from onecard.runs import log as runs_log
from onecard.runs.log import LOG, SAMPLES, Evaluations

WHOLE = [
    {"step": 0, "eval_loss": 0.5},  # before training: never the best
    {"step": 1, "loss": 2.0},
    {"step": 2, "eval_loss": 1.5},
    {"step": 3, "eval_loss": float("nan")},
    {"step": 4, "eval_loss": 1.75},
    {"eval_loss": 0.1},
    ["step", 5],
]


def write(path: Path, records: list, torn: str) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + torn, encoding="utf-8")


@pytest.mark.parametrize("torn", ["", '{"step": 5, "eval_lo', '{"step": 5, "eval_loss": 1.0}', "\x00\x00"])
def test_the_best_step_of_a_log_whose_last_line_is_half_written(tmp_path, torn):
    """A line counts once its end is written; the trainer and the chat with a run see the same best step."""
    write(tmp_path / LOG, WHOLE, torn)
    assert runs_log.evaluations(tmp_path) == Evaluations(4, 2, 1.5)
    assert runs_log.best_step(tmp_path) == 2


@pytest.mark.parametrize("torn", ["", '{"step": 9, "answ'])
def test_the_last_answers_of_a_file_whose_last_line_is_half_written(tmp_path, torn):
    write(tmp_path / SAMPLES, [{"step": 0, "answers": []}, {"step": 4, "answers": []}], torn)
    assert runs_log.last_sampled(tmp_path) == 4


def test_a_run_without_records(tmp_path):
    for names in ((), (LOG, SAMPLES)):
        for name in names:
            (tmp_path / name).touch()
        assert runs_log.evaluations(tmp_path) == Evaluations(-1, 0, None)
        assert runs_log.best_step(tmp_path) is None
        assert runs_log.last_sampled(tmp_path) == -1
