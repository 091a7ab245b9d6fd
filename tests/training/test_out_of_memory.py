"""Running out of memory repeats the same rows in smaller micro-batches, with the same gradient."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.__main__ import PROGRAMS
from onecard.errors import MEMORY, is_out_of_memory, run_program
from onecard.inference import chat
from onecard.models import trainable
from onecard.training import loop, metrics, out_of_memory
from tests.support import promises, tiny
from tests.support.paths import ROOT
from tests.support.promises import SMALL_STEPS, records
from tests.support.small_runs import options

LIMIT = 60 << 20  # bytes beyond what a run holds before its first step


@pytest.fixture(scope="module")
def untroubled(harness, tiny_model, tmp_path_factory) -> tuple[dict, Path]:
    return promises.untroubled_run(harness, tiny_model, tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize(
    "fault", [{"no_memory_at": [2]}, {"no_memory_at": [1, 12]}, {"no_memory_above": 240}], ids=str
)
def test_the_step_is_redone_with_the_same_gradient(harness, untroubled, tmp_path, fault):
    """T18: after one fault, several, or one in every large micro-batch, losses and adapter agree to 1e-6."""
    promises.the_step_is_redone_with_the_same_gradient(harness, untroubled, tmp_path, fault)


def test_a_real_limit_of_memory(harness, tiny_model, tmp_path):
    """T18: under a real limit of memory the budget falls until the rows fit, with the same loss."""
    rows = tiny.save_rows(tmp_path / "rows.json", 80)
    flags = {
        **SMALL_STEPS,
        "model_path": tiny_model,
        "data_path": rows,
        "max_steps": 1,
        "batch_size": 76,
        "cutoff_len": 300,
    }
    flags["micro_batch_tokens"] = 20000
    losses = []
    for name, fault in (("free", {}), ("limited", {"address_space": LIMIT})):
        answer = harness.run("finetune", {**flags, "output_path": tmp_path / name}, **fault)
        assert answer["code"] == 0, answer["said"]
        assert ("out of memory with micro-batches of 20000" in answer["said"]) == bool(fault), answer["said"]
        losses += [record["loss"] for record in records(tmp_path / name) if "loss" in record]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_the_dry_run_finds_the_limit_before_the_first_step(harness, untroubled, tmp_path):
    """The limit is reported once before any step, and a continued run remembers it."""
    flags, _ = untroubled
    run = tmp_path / "run"
    settings = {**flags, "output_path": run}
    answer = harness.run("finetune", settings, no_memory_above=240, kill_in_step=[4, 0])
    assert answer["code"] == -9  # after two tries of the dry run and one step it was killed in the next one
    output = answer["said"]
    assert output.count("out of memory") == 1
    assert output.index("out of memory") < output.index("step 1/")
    answer = harness.run("finetune_continue", {"output_path": run}, no_memory_above=240)
    assert answer["code"] == 0, answer["said"]
    assert "out of memory" not in answer["said"]


def test_the_dry_run_changes_nothing(tiny_model, tiny_rows, tmp_path, monkeypatch):
    """Adapter, optimizer and random state are bit-equal before and after it."""
    plain, seen = out_of_memory.dry_run, []

    def watched(trainer) -> bool:
        def state() -> list[torch.Tensor]:
            parameters = [p.detach().clone() for p in trainable.trainable(trainer.model)]
            assert all(p.grad is None for p in trainable.trainable(trainer.model))
            assert trainer.strategy.optimizer.state_dict()["state"] == {}
            return [*parameters, torch.get_rng_state()]

        torch.manual_seed(123)
        before = state()
        fits = plain(trainer)
        seen.append(all(torch.equal(a, b) for a, b in zip(before, state(), strict=True)))
        return fits

    monkeypatch.setattr(out_of_memory, "dry_run", watched)
    settings = options(tiny_model, tiny_rows, tmp_path / "run", max_steps=1, lora_dropout=0.3)
    loop.run(settings, sample=chat.reply, draw=metrics.loss_curve)
    assert seen == [True]


def test_a_single_row_that_does_not_fit_is_exit_6(harness, untroubled, tmp_path):
    """T18: the message says what would help, and the run can go on later."""
    flags, whole = untroubled
    run = tmp_path / "run"
    answer = harness.run("finetune", {**flags, "output_path": run}, no_memory_above=10)
    assert answer["code"] == 6, answer["said"]
    assert "a single row of" in answer["said"]
    assert "--cutoff_len" in answer["said"]
    answer = harness.run("finetune_continue", {"output_path": run})
    assert answer["code"] == 0, answer["said"]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (whole, run)]
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-6) for name in tensors[0])


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_memory):
    """Only messages of CUDA, cuBLAS, bitsandbytes and torch's CPU allocator count."""
    assert is_out_of_memory(error) == is_memory


def without_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("smaller", "fix"), [("--rows", "Try a smaller --rows."), ("", "End other programs")]
)
def test_what_a_program_says_without_memory(capsys, smaller, fix):
    with pytest.raises(SystemExit) as caught:
        run_program(without_memory, smaller)
    assert caught.value.code == MEMORY
    assert f"error: out of memory. {fix}" in capsys.readouterr().err


def advice(name: str) -> str:
    """The options that run_program names as advice for a sub-command."""
    return importlib.import_module(f"onecard.programs.{PROGRAMS[name][0]}").LESS_MEMORY


ADVISED = [name for name in PROGRAMS if advice(name)]


@pytest.mark.parametrize("name", ADVISED)
def test_the_advised_options_are_the_programs_own(name):
    command = [sys.executable, "-m", "onecard", name, "--help"]
    help_output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    flags = [word.strip(",") for word in advice(name).split() if word.startswith("--")]
    assert flags
    assert [flag for flag in flags if f"\n  {flag} " not in help_output.stdout] == []


def test_programs_that_hold_a_model_have_advice():
    assert {"finetune", "generate", "interaction", "quantize"} <= set(ADVISED)
