"""C16: runs that the previous release began are continued, and arrive where that release arrived.

tests/support/previous_release.py wrote them. test_written_before.py asks the same of an older version, as
programs and bit for bit; here are a loss scaler, another schedule, validation, and a run on other rows.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.runs import folder as runs_folder

FIXTURES = Path(__file__).parent
ROWS = {"first": "rows.json", "others": "other.json"}
CLOCKS = ("seconds", "peak_memory_bytes")


def records(folder: Path) -> list[dict]:
    """The log without times, and without the note that rows and base have moved."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values = [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]
    return [record for record in values if "continued" not in record]


@pytest.mark.parametrize("name", ROWS)
def test_a_run_of_the_previous_release_goes_on(harness, tmp_path, name):
    """Learning rates, rows and loss scale are equal; losses and adapter are too, up to fp16's rounding."""
    release = FIXTURES / "previous_release"
    run, finished = Path(shutil.copytree(release / name, tmp_path / "run")), release / f"{name}-finished"
    saved = max(runs_folder.checkpoint_steps(run))
    moved = {"model_path": FIXTURES / "written_before" / "base", "data_path": release / ROWS[name]}
    answer = harness.run("finetune_continue", {"output_path": run, **moved})
    assert answer["code"] == 0, answer["said"]
    expected, result = records(finished), records(run)
    steps = [record["step"] for record in result if "loss" in record]
    assert steps == [*range(steps[0], steps[-1] + 1)]
    assert steps[0] <= saved < steps[-1]
    assert len(expected) == len(result)
    for one, other in zip(expected, result, strict=True):
        assert other == pytest.approx(one, rel=2e-2, abs=1e-3)
    rates = [[line["learning_rate"] for line in lines if "loss" in line] for lines in (expected, result)]
    assert rates[1] == pytest.approx(rates[0], rel=1e-12)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (finished, run))
    assert before.keys() == after.keys()
    for tensor in before:
        torch.testing.assert_close(after[tensor], before[tensor], rtol=0, atol=2e-3)
