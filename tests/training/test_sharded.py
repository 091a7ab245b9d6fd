"""Models spread over two CPU processes by each file in sample/distributed train like one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.config.training import FinetuneConfig
from onecard.errors import UserError
from onecard.runs import checkpoint as runs_checkpoint
from onecard.training import sharded
from tests.support import ranks, tiny
from tests.support.paths import ROOT
from tests.support.resume_cases import flags, outcome, stopped_at

KINDS = sorted(path.stem for path in (ROOT / "sample" / "distributed").glob("*.yaml"))
KEYS = {"loss", "grad_norm", "eval_loss"}
QUICK = ("fsdp",)  # started by accelerate launch; DeepSpeed would first compile one of its parts
STEPS = {"num_epochs": 1, "lora_dropout": 0.0, "eval_steps": 2}  # four steps


def launch(kind: str, program: str, given: dict, processes: int = 2) -> subprocess.Popen:
    """Start a program of two processes with `accelerate launch`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--num_processes", str(processes)]
    command += ["--config_file", f"sample/distributed/{kind}.yaml", f"{program}.py"]
    command += [f"--{name}={value}" for name, value in given.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def said(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=300)
    return text


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.save_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)


@pytest.fixture(scope="module")
def alone(harness, tiny_model, tied_model, rows, tmp_path_factory):
    """A function from options to the folder of a run in one process, which has the whole model."""
    folders = {}

    def run(tied: bool = False, **changes) -> Path:
        key, base = json.dumps([tied, changes]), tied_model if tied else tiny_model
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("alone") / "run"
            answer = harness.run("finetune", flags(base, rows, folders[key], **{**STEPS, **changes}))
            assert answer["code"] == 0, answer["said"]
        return folders[key]

    return run


def close(one: Path, other: Path, relative: float) -> None:
    """Check that losses, norms and trained weights are the same but for rounding."""
    logs = [[r for r in outcome(run)["log"] if KEYS & r.keys()] for run in (one, other)]
    assert [record["step"] for record in logs[0]] == [record["step"] for record in logs[1]]
    for mine, theirs in zip(*logs, strict=True):
        for key in KEYS & mine.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=relative), (mine["step"], key)
    name = "model/model.safetensors" if (one / "model").is_dir() else "adapter_model.safetensors"
    first, second = load_file(one / name), load_file(other / name)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert (tensor - second[key]).norm() <= 30 * relative * tensor.norm() + 1e-7, key


def goes_on_spread_and_alone_again(kind: str, harness, whole: Path, tmp_path: Path, relative: float) -> None:
    """Check a run of one process to step 2, two to the end, and one again from step 3 of the two."""
    run = stopped_at(whole, 2, tmp_path / "run")
    process = launch(kind, "finetune_continue", {"output_path": run})
    text = said(process)
    assert process.returncode == 0, text
    assert "sharded     over 2 processes" in text
    close(whole, run, relative)
    moments = [load_file(path / "checkpoint-4" / "optimizer.safetensors") for path in (whole, run)]
    assert moments[0].keys() == moments[1].keys()
    assert all((moments[0][k] - v).norm() <= 1e3 * relative * v.norm() + 1e-7 for k, v in moments[1].items())
    runs_checkpoint.verify(run / "checkpoint-3")
    again = stopped_at(run, 3, tmp_path / "again")
    answer = harness.run("finetune_continue", {"output_path": again})
    assert answer["code"] == 0, answer["said"]
    close(whole, again, relative)


@pytest.mark.parametrize("kind", QUICK)
def test_spread_runs_are_those_of_one_process(harness, alone, tmp_path, kind):
    """With LoRA in fp32, moments, position and weights go from one process to two and back."""
    goes_on_spread_and_alone_again(kind, harness, alone(tied=kind == "fsdp"), tmp_path, 1e-5)


def two_steps_are_those_of_one_process(kind: str, harness, alone, model: Path, rows: Path, run: Path) -> None:
    """Check two steps with a sharded model; and the second alone, from the checkpoint of the first."""
    whole, settings = alone(max_steps=2), flags(model, rows, run, **STEPS, max_steps=2)
    environment = ranks.of_accelerate(ROOT / "sample" / "distributed" / f"{kind}.yaml")
    fault = {"plain_gloo": True} if kind.startswith("zero") else {}
    answers = ranks.run(harness, "finetune", settings, environment=environment, faults=(fault, fault))
    assert [answer["code"] for answer in answers] == [0, 0], answers
    assert "sharded     over 2 processes" in answers[0]["said"]
    close(whole, run, 1e-5)
    again = stopped_at(run, 1, run.parent / "again")
    answer = harness.run("finetune_continue", {"output_path": again})
    assert answer["code"] == 0, answer["said"]
    close(whole, again, 1e-5)
    moments = [load_file(path / "checkpoint-2" / "optimizer.safetensors") for path in (whole, run, again)]
    for other in moments[1:]:
        assert moments[0].keys() == other.keys()
        assert all((tensor - other[key]).norm() <= 1e-2 * tensor.norm() for key, tensor in moments[0].items())


def test_two_steps_of_zero_2(harness, alone, tiny_model, rows, tmp_path):
    """DeepSpeed's engine sums and updates as one process does."""
    two_steps_are_those_of_one_process("zero2", harness, alone, tiny_model, rows, tmp_path / "run")


@pytest.mark.ci
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("fsdp", "zero2")])
def test_two_steps_of_every_kind(harness, alone, tiny_model, rows, tmp_path, kind):
    two_steps_are_those_of_one_process(kind, harness, alone, tiny_model, rows, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp_offload", "zero3_offload"])
def test_one_process_with_its_model_in_the_processors_memory(tiny_model, rows, alone, tmp_path, kind):
    """One process that offloads gives the same run, and saves only when a save is due."""
    run = tmp_path / "run"
    options = flags(tiny_model, rows, run, **STEPS, save_steps=200)
    process = launch(kind, "finetune", options, processes=1)
    text = said(process)
    assert process.returncode == 0, text
    close(alone(), run, 1e-5)
    improved = [r["step"] for r in outcome(run)["log"] if "eval_loss" in r and r["step"]]
    saved_steps = {int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")}
    assert saved_steps <= {0, 4, *improved}
    assert {0, 4} <= saved_steps


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK])
def test_all_kinds_of_spread_runs(harness, alone, tmp_path, kind):
    goes_on_spread_and_alone_again(kind, harness, alone(), tmp_path, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero2_offload", "zero3"])
def test_all_weights_spread(harness, alone, tmp_path, kind):
    whole = alone(tied=True, train_what="full", learning_rate=1e-3)
    goes_on_spread_and_alone_again(kind, harness, whole, tmp_path, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("fsdp", "bf16"), ("fsdp", "fp16"), ("zero2", "bf16"), ("zero3", "bf16")]
)
def test_half_precision_spread(tiny_model, rows, alone, tmp_path, kind, dtype):
    """Losses agree from the first step on but for rounding, also with the scaler of fp16."""
    whole, run = alone(dtype=dtype), tmp_path / "run"
    process = launch(kind, "finetune", flags(tiny_model, rows, run, dtype=dtype, **STEPS))
    text = said(process)
    assert process.returncode == 0, text
    logs = [[r["loss"] for r in outcome(path)["log"] if "loss" in r] for path in (whole, run)]
    assert logs[0] == pytest.approx(logs[1], rel=2e-3)
    saved = load_file(run / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_same_step(harness, alone, tiny_model, rows, tmp_path):
    """After SIGTERM to one process both stop after the same step, which is saved."""
    run = tmp_path / "run"
    options = flags(tiny_model, rows, run, **{**STEPS, "num_epochs": 100})
    process = launch("fsdp", "finetune", options)
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-2").is_dir():
        assert process.poll() is None, said(process)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGTERM)
    text = said(process)
    assert process.returncode != 0
    assert "all of it is saved" in text
    newest, problems = runs_checkpoint.newest(run)
    assert newest is not None
    assert problems == []
    assert f"after step {newest.name.removeprefix('checkpoint-')}:" in text


@pytest.mark.parametrize(
    ("kind", "changes", "word"),
    [
        ("FSDP", {}, "8 bits"),
        ("FSDP", {"bits": 16, "train_what": "embeddings"}, "--train_what embeddings"),
        ("FSDP", {"bits": 16, "optimizer": "adamw_8bit"}, "--optimizer adamw_8bit"),
        ("DeepSpeed", {"bits": 16, "dtype": "fp16"}, "--dtype fp16"),
    ],
)
def test_what_cannot_be_spread_is_said(monkeypatch, kind, changes, word):
    options = FinetuneConfig(**changes)
    sharded.check(options, "fp32")  # without accelerate launch nothing is spread
    monkeypatch.setenv(sharded.MARKS[kind], "true")
    with pytest.raises(UserError, match=word) as caught:
        sharded.check(options, options.dtype)
    assert caught.value.code == 2
