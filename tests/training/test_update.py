"""What options of the update do in a whole run: weight decay, gradient clipping, warm-up and dropout."""

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from onecard.training import loop
from tests.support import small_runs, tiny
from tests.support.two_processes import encode_tiny


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """A function from options to the folder of a run that saved every step."""
    rows = tiny.save_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)

    def train(**changes) -> Path:
        folder = tmp_path_factory.mktemp("run") / "run"
        steady = {"test_size": 0, "save_steps": 1, "max_steps": 1, "lora_dropout": 0}
        settings = small_runs.options(tiny_model, rows, folder, **{**steady, **changes})
        loop.run(settings, sample=lambda *_: [], draw=lambda *_: None)
        return folder

    return train


def records(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in lines if "loss" in record]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_weight_decay_shrinks_the_weights_by_its_share_of_the_rate(run, optimizer):
    """At the first step matrix A has no gradient yet, because B is zero: only the decay moves it.

    Decoupled weight decay multiplies it by 1 - rate * decay (Loshchilov and Hutter 2019).
    """
    for decay in (0.5, 0.0):
        folder = run(weight_decay=decay, learning_rate=1e-2, optimizer=optimizer)
        before, after = (
            load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (0, 1)
        )
        matrices = [name for name in before if "lora_A" in name]
        assert matrices
        for name in matrices:
            torch.testing.assert_close(after[name], before[name] * (1 - 1e-2 * decay), rtol=1e-6, atol=0)


@pytest.mark.parametrize("most", [0.01, 0.0, 1e6])
def test_gradients_are_clipped_to_the_largest_norm(run, most):
    """After one step the first moment is a tenth of the gradient that the optimizer got; 0 clips nothing.

    The log has the norm before clipping.
    """
    folder = run(max_grad_norm=most)
    moments = load_file(folder / "checkpoint-1" / "optimizer.safetensors")
    flat = torch.cat([value.flatten() for name, value in moments.items() if name.endswith(".exp_avg")])
    norm = records(folder)[0]["grad_norm"]
    assert norm > 0.02
    assert flat.norm().item() == pytest.approx(0.1 * (min(norm, most) if most else norm), rel=1e-4)


@pytest.mark.parametrize(("changes", "warmup"), [({"warmup_steps": 100}, 6), ({"warmup_ratio": 0.15}, 5)])
def test_the_warm_up_takes_all_of_its_steps(run, changes, warmup):
    """100 steps of warm-up become a fifth of a run of 30 steps; every rate is that of get_scheduler."""
    folder = run(max_steps=30, batch_size=1, save_steps=1000, learning_rate=1e-2, **changes)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=warmup, num_training_steps=30)
    for record in records(folder):
        assert record["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        scheduler.step()


class Masks:
    """A strategy that draws a dropout mask where a model would draw its masks."""

    def level(self, share, examples, row):
        return share

    def gradient(self, micro_batches, targets, scaler, advance):
        return torch.nn.functional.dropout(torch.ones(256), 0.5).tolist()


def mask(step: int) -> list[float]:
    """The dropout mask of a step in this process."""
    options = types.SimpleNamespace(seed=42)
    plan = types.SimpleNamespace(options=options, data=types.SimpleNamespace(examples=encode_tiny(4)))
    progress = types.SimpleNamespace(step=step, micro_batch_tokens=1000)
    parts = {"plan": plan, "progress": progress, "strategy": Masks(), "scaler": None, "device": "cpu"}
    metrics = types.SimpleNamespace(advance=None)
    trainer = types.SimpleNamespace(**parts, metrics=metrics, model=torch.nn.Linear(1, 1))
    return loop.gradient(trainer, np.arange(4), 1)


def test_each_process_and_each_step_has_its_own_dropout(monkeypatch):
    """The masks of two processes differ, and a process that starts again at a step has those of before."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    masks = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        masks |= {(rank, step): mask(step) for step in range(3)}
    assert len({tuple(values) for values in masks.values()}) == len(masks)
    assert {value for values in masks.values() for value in values} == {0.0, 2.0}
    for (rank, step), values in reversed(masks.items()):
        torch.rand(7)
        monkeypatch.setenv("RANK", rank)
        assert mask(step) == values
