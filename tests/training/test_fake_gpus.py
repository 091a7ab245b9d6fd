"""Whole trainings as on GPUs that this machine does not have: their plan, their budget and their loss scaler.

All that is decided by a GPU is decided by what tests/support/fake_gpus.py answers; the CPU computes.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from onecard.errors import USAGE
from onecard.models import memory as models_memory
from onecard.system import hardware
from onecard.training import loop, plan, replicated, trainer
from onecard.training import memory as training_memory
from tests.support import fake_gpus, ranks, tiny
from tests.support.fake_gpus import GIB
from tests.support.promises import records
from tests.support.resume_cases import differences, flags, outcome, stopped_at
from tests.support.small_runs import options

pytestmark = pytest.mark.usefixtures("one_thread")
TURING = ("GeForce RTX 2080 Ti", 10.2)
AUTO = {"device": "auto", "dtype": "auto", "micro_batch_tokens": "auto", "max_steps": 6}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.save_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)


@pytest.fixture(scope="module")
def skipped(harness, tiny_model, rows, tmp_path_factory) -> tuple[Path, str]:
    """A run on the 2080 Ti whose second step overflows, and what it printed."""
    run = tmp_path_factory.mktemp("turing") / "run"
    settings = flags(tiny_model, rows, run, **AUTO, bits=8)
    answer = harness.run("finetune", settings, gpus=[TURING], overflow_in_update=2)
    assert answer["code"] == 0, answer["said"]
    return run, answer["said"]


def test_the_plan_of_a_2080_ti(skipped):
    """It computes in fp16 with fp32 adapter weights and gradient checkpointing, and says why."""
    run, output = skipped
    assert "device      cuda:0: NVIDIA GeForce RTX 2080 Ti" in output
    assert "dtype       computation in fp16: compute capability 7.5 is below 8.0" in output
    assert "activations gradient checkpointing is on: on a GPU memory is scarcer than speed" in output
    assert "tokens: estimated to fit into 10.2 of the GPU's 11.0 GiB" in output
    resolved = json.loads((run / "finetune_config.json").read_text())["resolved"]
    choices = {name: resolved[name] for name in ("device", "dtype", "gradient_checkpointing")}
    assert choices == {"device": "cuda:0", "dtype": "fp16", "gradient_checkpointing": True}
    tensors = load_file(run / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_an_overflow_skips_one_step(skipped):
    """The scale starts low and is halved by the overflow; neither adapter, moments nor schedule move."""
    run, _ = skipped
    steps = [record for record in records(run) if "loss" in record]
    assert [record["loss_scale"] for record in steps] == [1024, 512, 512, 512, 512, 512]
    assert [record["skipped_steps"] for record in steps] == [0, 1, 1, 1, 1, 1]
    assert [record["grad_norm"] == "inf" for record in steps] == [False, True, *[False] * 4]
    assert steps[2]["learning_rate"] == steps[1]["learning_rate"] != steps[0]["learning_rate"]
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        before, skip, after = (load_file(run / f"checkpoint-{step}" / name) for step in (1, 2, 3))
        assert all(torch.equal(before[key], skip[key]) for key in before)
        assert any(not torch.equal(skip[key], after[key]) for key in after)
    scaler = json.loads((run / "checkpoint-3" / "progress.json").read_text())["scaler"]
    assert (scaler["scale"], scaler["_growth_tracker"]) == (512, 1)


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_with_a_skipped_step_continues_bit_for_bit(harness, skipped, tmp_path, step):
    """Scale, its counter, adapter and moments are those of the run that never stopped."""
    whole, run = skipped[0], stopped_at(skipped[0], step, tmp_path / "run")
    fault = {"overflow_in_update": 2 - step} if step < 2 else {}
    answer = harness.run("finetune_continue", {"output_path": run}, gpus=[TURING], **fault)
    assert answer["code"] == 0, answer["said"]
    assert "Changed" not in answer["said"]
    assert differences(outcome(whole), outcome(run)) == []


def test_a_run_moves_to_a_card_with_bf16_and_back(harness, skipped, tmp_path):
    """With auto, a continued run computes as its GPU does best; the loss scaler comes and goes with fp16."""
    run = stopped_at(skipped[0], 3, tmp_path / "run")
    answer = harness.run("finetune_continue", {"output_path": run}, gpus=[["GeForce RTX 3060", 11.0]])
    assert answer["code"] == 0, answer["said"]
    assert "dtype fp16 -> bf16" in answer["said"]
    assert "computation in bf16" in answer["said"]
    log = [record for record in records(run) if "loss" in record]
    assert ["loss_scale" in record for record in log] == [True] * 3 + [False] * 3
    (run / "finished.json").unlink()
    shutil.rmtree(run / "checkpoint-6")
    answer = harness.run("finetune_continue", {"output_path": run}, gpus=[TURING])
    assert answer["code"] == 0, answer["said"]
    assert "computation in fp16" in answer["said"]
    assert records(run)[-2]["loss_scale"] == 1024


def test_another_model_of_gpu_or_cpu_is_named(harness, skipped, tmp_path):
    """Its sums round differently, though cuda:0 is its name as well."""
    for before, is_named in (("NVIDIA GeForce RTX 2070", True), ("NVIDIA GeForce RTX 2080 Ti", False)):
        run = stopped_at(skipped[0], 5, tmp_path / before)
        path = run / "finetune_config.json"
        stored = json.loads(path.read_text())
        assert stored["resolved"]["device_name"] == "NVIDIA GeForce RTX 2080 Ti"
        path.write_text(json.dumps({**stored, "resolved": {**stored["resolved"], "device_name": before}}))
        answer = harness.run("finetune_continue", {"output_path": run}, gpus=[TURING])
        assert answer["code"] == 0, answer["said"]
        change = f"Changed: device_name {before} -> NVIDIA GeForce RTX 2080 Ti."
        assert (change in answer["said"]) == is_named, answer["said"]
        assert ("does not go on" in answer["said"]) == is_named


def test_a_run_of_an_earlier_version_names_no_device(harness, skipped, tmp_path):
    run = stopped_at(skipped[0], 5, tmp_path / "run")
    path = run / "finetune_config.json"
    stored = json.loads(path.read_text())
    del stored["resolved"]["device_name"]
    path.write_text(json.dumps(stored))
    answer = harness.run("finetune_continue", {"output_path": run}, gpus=[TURING])
    assert (answer["code"], "Changed" in answer["said"]) == (0, False), answer["said"]
    assert "device_name" not in json.loads(path.read_text())["resolved"]


def test_the_name_of_a_device(monkeypatch):
    fake_gpus.put(monkeypatch, TURING, ("A100-SXM4-80GB", 70))
    assert hardware.device_name("cuda:1") == "NVIDIA A100-SXM4-80GB"
    assert hardware.describe_machine().startswith(f"{hardware.device_name('cpu')}, ")


def test_the_model_recomputes_its_activations(tiny_model, rows, tmp_path, monkeypatch):
    """On a GPU gradient checkpointing is really on, with auto; with off it is off."""
    fake_gpus.put(monkeypatch, TURING)
    states = []
    for choice in ("auto", "off"):
        settings = options(tiny_model, rows, tmp_path / choice, device="auto", max_steps=1)
        settings = dataclasses.replace(settings, gradient_checkpointing=choice)

        def look(model, *_) -> list[str]:
            states.append(model.is_activation_checkpointing)
            return []

        loop.run(settings, sample=look, draw=lambda *_: None)
    assert states == [True, True, False, False]


@pytest.fixture(scope="module")
def large_plan(tiny_model, tmp_path_factory) -> plan.Plan:
    """The plan of a run whose steps are far too large for a GPU, with the shapes of a model of 7B."""
    place = tmp_path_factory.mktemp("large")
    settings = options(tiny_model, tiny.save_rows(place / "rows.json", 400), place / "run", batch_size=300)
    with pytest.MonkeyPatch.context() as patch:
        fake_gpus.put(patch, TURING)
        auto = dataclasses.replace(settings, device="auto", dtype="auto", cutoff_len=512)
        return dataclasses.replace(plan.prepare(auto), base_config=LlamaConfig())


def budget(large_plan: plan.Plan, monkeypatch, *card) -> int:
    fake_gpus.put(monkeypatch, card)
    return trainer.micro_batch_budget(large_plan, replicated.Replicated(1.0))


@pytest.mark.parametrize(
    ("card", "free"),
    [("GeForce RTX 2080 Ti", 3.2), ("Tesla T4", 7.0), ("GeForce RTX 3060", 4.5), ("A100-SXM4-80GB", 3.2)],
)
def test_the_budget_is_what_fits_into_the_free_memory(large_plan, monkeypatch, capsys, card, free):
    """As many tokens as fit into four fifths of it, whatever the GPU has in all."""
    tokens = budget(large_plan, monkeypatch, card, free)
    per_token = training_memory.bytes_per_token(large_plan.base_config, 2, checkpointing=True)
    room = models_memory.SAFETY * free * GIB - 16 * 256 * 32000  # logits of 256 targets, in fp32 four times
    assert tokens * per_token <= room < (tokens + 1) * per_token
    total = fake_gpus.CARDS[card][1] / GIB
    assert (
        f"{tokens} tokens: estimated to fit into {free} of the GPU's {total:.1f} GiB"
        in capsys.readouterr().out
    )


def test_the_budget_follows_dtype_and_checkpointing(large_plan, monkeypatch):
    """fp32 and kept activations need more memory for each token, so that fewer fit."""
    fits = budget(large_plan, monkeypatch, "A100-SXM4-80GB", 4)
    for change in ({"dtype": "fp32"}, {"checkpointing": False}):
        assert budget(dataclasses.replace(large_plan, **change), monkeypatch, "A100-SXM4-80GB", 4) < fits


def test_little_free_memory_on_a_large_card(large_plan, monkeypatch, capsys):
    """A row is not cut, so the budget is one row; that fewer tokens are estimated to fit is said."""
    assert budget(large_plan, monkeypatch, "A100-SXM4-80GB", 0.3) == large_plan.options.cutoff_len == 512
    output = capsys.readouterr().out
    assert "though only 275 are estimated to fit into 0.3 of the GPU's 80.0 GiB" in output


def test_the_budget_is_at_most_a_step(large_plan, monkeypatch):
    lengths = sorted(large_plan.data.examples.lengths.tolist())
    assert budget(large_plan, monkeypatch, "A100-SXM4-80GB", 79) == sum(lengths[-300:])


def test_the_prediction_is_that_of_the_card(tiny_model, monkeypatch):
    """The window's prediction has the dtype and the checkpointing of the GPU, and fits its free memory."""
    settings = options(tiny_model, "", "", device="auto", batch_size=100000)
    settings = dataclasses.replace(settings, dtype="auto")
    monkeypatch.setattr("onecard.system.hardware.cpu_has_bf16", lambda: False)
    fake_gpus.put(monkeypatch, TURING)
    free = 2**30
    parts = training_memory.predict(settings, str(tiny_model), "cuda:0", free)
    on_cpu = training_memory.predict(settings, str(tiny_model), "cpu", None)
    assert parts["weights"] * 2 == on_cpu["weights"]
    beside = sum(parts.values()) - parts["activations"]
    assert parts["activations"] == pytest.approx(models_memory.SAFETY * (1 - beside), rel=1e-3)
    less = training_memory.predict(settings, str(tiny_model), "cuda:0", free // 2)
    assert less["activations"] < 0.6 * parts["activations"]


def two_processes(harness, model: Path, rows: Path, run: Path, machines: list, local: int) -> list[dict]:
    """The answers of two processes of one run; machines: the GPUs that each of them sees."""
    settings = {**flags(model, rows, run, **AUTO), "max_steps": 2}
    return ranks.run(harness, "finetune", settings, local, faults=[{"gpus": cards} for cards in machines])


def test_two_cards_train_in_the_dtype_of_the_older(harness, tiny_model, rows, tmp_path):
    """The process of the newer GPU computes in fp16 too, with the same budget."""
    cards = [["GeForce RTX 3060", 11.5], ["GeForce RTX 2080 Ti", 0.005]]
    answers = two_processes(harness, tiny_model, rows, tmp_path / "run", [cards, cards], local=2)
    assert [answer["code"] for answer in answers] == [0, 0], answers
    assert "computation in fp16: compute capability 7.5 of NVIDIA GeForce RTX 2080 Ti" in answers[0]["said"]
    resolved = json.loads((tmp_path / "run" / "finetune_config.json").read_text())["resolved"]
    assert (resolved["processes"], resolved["dtype"], resolved["device"]) == (2, "fp16", "cuda:0")
    assert resolved["micro_batch_tokens"] < 1329


def test_machines_of_different_dtypes_are_refused(harness, tiny_model, rows, tmp_path):
    """Processes that cannot see each other's GPUs end with exit code 2 before the first step."""
    machines = [[["A100-SXM4-80GB", 70]], [["Tesla T4", 14]]]
    answers = two_processes(harness, tiny_model, rows, tmp_path / "run", machines, local=1)
    assert [answer["code"] for answer in answers] == [USAGE, USAGE], answers
    assert all("--dtype" in answer["said"] for answer in answers)
    assert not (tmp_path / "run").exists()
