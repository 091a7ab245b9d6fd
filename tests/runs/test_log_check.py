"""A run goes on only with a log that has all steps of its checkpoint, and says what is wrong with another."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import log as runs_log
from onecard.runs import log_check
from onecard.runs.checkpoint import Progress
from tests.support import power_failure, resume_cases, tiny
from tests.support.resume_cases import differences, outcome, stopped_at

STEP = {"loss": 1.0, "tokens": 10, "seconds": 0.5}


@pytest.fixture(scope="module")
def whole(harness, tiny_model, tmp_path_factory) -> Path:
    """A run of 12 steps that was never stopped."""
    place = tmp_path_factory.mktemp("whole")
    rows = tiny.save_rows(place / "rows.json", 24)
    answer = harness.run("finetune", resume_cases.flags(tiny_model, rows, place / "run"))
    assert answer["code"] == 0, answer["said"]
    return place / "run"


def lines_of(folder: Path) -> list[str]:
    return (folder / "log.jsonl").read_text().splitlines(keepends=True)


def position(lines: list[str], step: int) -> int:
    """The index of the line that follows the record of a step."""
    records = [json.loads(line) for line in lines if line.endswith("}\n")]
    return 1 + next(n for n, record in enumerate(records) if record["step"] == step and "loss" in record)


def cut(lines: list[str]) -> list[str]:
    return lines[: position(lines, 2)]


def half_line(lines: list[str]) -> list[str]:
    at = position(lines, 3)
    return [*lines[: at - 1], lines[at - 1][:30], *lines[at:]]


def swapped(lines: list[str]) -> list[str]:
    at = position(lines, 4)
    return [*lines[: at - 1], lines[at], lines[at - 1], *lines[at + 1 :]]


def twice(lines: list[str]) -> list[str]:
    at = position(lines, 4)
    return [*lines[:at], lines[at - 1], *lines[at:]]


def other_tokens(lines: list[str]) -> list[str]:
    return [change(line, tokens=7) for line in lines]


def other_times(lines: list[str]) -> list[str]:
    return [change(line, seconds=9.5) for line in lines]


def change(line: str, **values) -> str:
    record = json.loads(line) if line.endswith("}\n") else {}
    return json.dumps(record | values) + "\n" if "loss" in record else line


DAMAGES = {
    "cut after step 2 of 6": (cut, "has no record of steps 3 to 6"),
    "empty": (lambda lines: [], "has no record of steps 1 to 6"),
    "without its beginning": (lambda lines: lines[position(lines, 2) :], "has no record of steps 1 to 2"),
    "without one step": (
        lambda lines: lines[: position(lines, 4) - 1] + lines[position(lines, 4) :],
        "of step 4",
    ),
    "with half a line in its middle": (half_line, "is damaged in line"),
    "with a damaged byte": (lambda lines: [lines[0], "\x00" + lines[1][1:], *lines[2:]], "damaged in line 2"),
    "with a deep line": (lambda lines: [lines[0], "[" * 100_000 + "\n", *lines[1:]], "is damaged in line 2"),
    "with two steps swapped": (swapped, "has steps twice or in another order"),
    "with a step twice": (twice, "has steps twice or in another order"),
    "of a run on other rows": (other_tokens, "is that of another run"),
    "of another run on these rows": (other_times, "is that of another run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_log_without_the_steps_of_its_checkpoint(whole, tmp_path, damage):
    """Each kind of damage is named; without damage, and with anything after the checkpoint, nothing is."""
    run = stopped_at(whole, 6, tmp_path / "run")
    progress = runs_checkpoint.read_progress(run / "checkpoint-6")
    assert log_check.problem(run, progress, 0) is None
    change_log, words = DAMAGES[damage]
    lines = change_log(lines_of(run))
    (run / "log.jsonl").write_text("".join(lines))
    assert words in log_check.problem(run, progress, 0)


def test_a_run_with_a_short_log_is_refused_and_goes_on_from_an_earlier_step(harness, whole, tmp_path):
    """Exit code 4 names the log, the steps and both ways out; nothing is written; the first way is exact."""
    run = stopped_at(whole, 6, tmp_path / "run")
    (run / "log.jsonl").write_text("".join(cut(lines_of(run))))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    answer = harness.run("finetune_continue", {"output_path": run})
    assert answer["code"] == 4, answer["said"]
    assert "log.jsonl has no record of steps 3 to 6" in answer["said"]
    assert f"--resume_from_checkpoint {run / 'checkpoint-2'};" in answer["said"]
    assert f"--resume_from_checkpoint {run / 'checkpoint-6'} --output_path NEW_FOLDER" in answer["said"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    answer = harness.run("finetune_continue", {"resume_from_checkpoint": run / "checkpoint-2"})
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(whole), outcome(run)) == []


def test_a_missing_log_is_refused_and_the_adapter_goes_on_elsewhere(harness, whole, tmp_path):
    """The checkpoint can begin a new run, whose log begins at that step; it is checked from there."""
    run, new = stopped_at(whole, 6, tmp_path / "run"), tmp_path / "new"
    (run / "log.jsonl").unlink()
    answer = harness.run("finetune_continue", {"output_path": run})
    assert answer["code"] == 4, answer["said"]
    assert "log.jsonl is missing" in answer["said"]
    wish = {"resume_from_checkpoint": run / "checkpoint-6", "output_path": new}
    answer = harness.run("finetune_continue", wish, kill_in_step=[4, 0])
    assert answer["code"] == -9, answer["said"]
    assert json.loads((new / "finetune_config.json").read_text())["resolved"]["begun_at"] == 6
    text = (new / "log.jsonl").read_text()
    (new / "log.jsonl").write_text("".join(line for line in lines_of(new) if '"step": 7, "loss"' not in line))
    assert (new / "log.jsonl").read_text() != text
    answer = harness.run("finetune_continue", {"output_path": new})
    assert (answer["code"], "has no record of step 7" in answer["said"]) == (4, True), answer["said"]
    (new / "log.jsonl").write_text(text)
    assert harness.run("finetune_continue", {"output_path": new})["code"] == 0


def written(folder: Path, steps: list[int]) -> Path:
    """A folder with a log of these steps."""
    folder.mkdir()
    lines = [json.dumps({**STEP, "step": step, "rows_seen": 6 * step}) for step in steps]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_the_beginning_of_an_earlier_versions_run_may_be_unknown(tmp_path):
    """Such a run took its weights from elsewhere: then its log is complete from its own first step on."""
    progress = Progress(step=9, tokens=20, seconds=1.0)
    assert log_check.problem(written(tmp_path / "whole", [8, 9]), progress, None) is None
    assert log_check.problem(written(tmp_path / "fresh", []), progress, None) is None
    assert "of step 8" in log_check.problem(written(tmp_path / "gap", [7, 9]), progress, None)
    assert "of step 8" in log_check.problem(written(tmp_path / "known", [9]), progress, 7)


@pytest.fixture
def little_time():
    """Ten seconds of computing: work that grows with the square of the steps takes minutes."""

    def end(*_) -> None:
        pytest.fail("this takes far too long")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, 10)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.usefixtures("little_time")
def test_an_emptied_log_of_a_long_run_is_refused_at_once(tmp_path):
    steps = 200_000
    run = written(tmp_path / "run", [])
    problem = log_check.problem(run, Progress(step=steps), 0)
    assert problem == f"has no record of steps 1 to {steps}"


def test_the_log_is_read_once_for_all_earlier_checkpoints(tmp_path, monkeypatch):
    run, reads = written(tmp_path / "run", [1]), []
    for step in (1, 2, 3, 4):
        power_failure.save(run, step)
    monkeypatch.setattr(
        log_check, "record_of", lambda line: reads.append(line) or runs_folder.record_of(line)
    )
    monkeypatch.setattr(runs_checkpoint, "verified_progress", lambda path: progress_of(path))
    assert log_check.covered(run, 5, 0) == run / "checkpoint-1"
    assert len(reads) == 1


def progress_of(checkpoint: Path) -> Progress:
    step = int(checkpoint.name.split("-")[1])
    return Progress(step=step, tokens=10 * step, seconds=0.5 * step)


def test_what_comes_after_the_checkpoint_may_be_anything(whole, tmp_path):
    """A kill or a power failure leaves longer logs and broken ends: they are cut off, which is said."""
    run = stopped_at(whole, 6, tmp_path / "run")
    progress = runs_checkpoint.read_progress(run / "checkpoint-6")
    for end in ('{"step": 7, "lo', "\x00\x00\n\x00", '{"step": 7, "loss": "nan"}\n', "[[[\n{}\n"):
        (run / "log.jsonl").write_text("".join(lines_of(whole)[: position(lines_of(whole), 6)]) + end)
        assert log_check.problem(run, progress, 0) is None, end
        assert any("1 lines" in text or "2 lines" in text for text in runs_folder.go_back(run, 6)), end
        assert [record["step"] for record in runs_log.records(run / "log.jsonl")][-1] == 6


def test_damaged_answers_do_not_stop_a_run(tmp_path):
    """samples.jsonl decides nothing: a damaged line goes where later lines go, and readers leave it out."""
    good = [json.dumps({"step": step, "answers": []}) + "\n" for step in (0, 3)]
    for damage in ("\x00\n", "[" * 100_000 + "\n", '{"step": "3"}\n', '{"step": true}\n', '{"answers": 1}\n'):
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "samples.jsonl").write_text(good[0] + damage + good[1])
        assert list(runs_log.samples(folder)) == [0, 3]
        assert runs_log.last_sampled(folder) == 3
        assert runs_folder.go_back(folder, 3) == [
            "1 lines that are later or damaged are now in log.dropped.jsonl"
        ]
        assert (folder / "samples.jsonl").read_text() == "".join(good)
        shutil.rmtree(folder)
