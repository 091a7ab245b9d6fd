"""A run that was stopped in any way goes on bit for bit as if it had not been stopped."""

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import random
import re
import shutil
import struct
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.config import options as config_options
from onecard.config import training as config_training
from onecard.errors import UserError
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.system import hardware
from onecard.training import loop, resume
from onecard.training.starting_point import StartingPoint
from tests.support import fake_hub, faults, promises, tiny
from tests.support.paths import ROOT
from tests.support.resume_cases import STEPS, VARIANTS, differences, flags, outcome, stopped_at, straight_runs


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.save_rows(tmp_path_factory.mktemp("rows") / "rows.json", 24)


@pytest.fixture(scope="module")
def straight(harness, tiny_model, rows, tmp_path_factory):
    """A function from the name of a variant to the folder of a run that was never stopped."""
    return straight_runs(harness, tiny_model, rows, tmp_path_factory.mktemp("straight"))


def go_on(harness, run: Path, **fault) -> dict:
    return harness.run("finetune_continue", {"output_path": run}, **fault)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_run_goes_on_bit_for_bit_from_any_step(harness, straight, tmp_path, variant):
    """T1, T4, T5, T8, T25: continued from any of 12 steps, a run of uneven epochs equals a straight run."""
    whole = straight(variant)
    expected = outcome(whole)
    assert len([record for record in expected["log"] if "loss" in record]) == STEPS
    steps = range(STEPS) if variant == "16 bits" else (3, 7)  # resilience.py tries all of them

    def cell(step: int) -> list[str]:
        run = stopped_at(whole, step, tmp_path / str(step))
        answer = go_on(harness, run)
        assert answer["code"] == 0, answer["said"]
        assert not list(run.glob(".saving*"))
        return differences(expected, outcome(run))

    assert dict(zip(steps, harness.map(cell, steps), strict=True)) == {step: [] for step in steps}


def test_a_run_goes_on_after_every_step(harness, straight, tiny_model, rows, tmp_path):
    """T2, T3: a run that is killed and continued within every step ends with the same bytes."""
    run = tmp_path / "run"
    answer = harness.run("finetune", flags(tiny_model, rows, run), kill_in_step=[1, 0])
    assert answer["code"] == -9
    for number in range(STEPS - 1):
        answer = go_on(harness, run, kill_in_step=[3, int(number % 4 != 2)])
        assert answer["code"] == -9, answer["said"]
        assert max(runs_folder.checkpoint_steps(run)) == number + 1
    assert go_on(harness, run)["code"] == 0
    assert differences(outcome(straight("16 bits")), outcome(run)) == []
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == STEPS


@pytest.mark.parametrize("mutant", faults.MUTANTS)
def test_a_broken_resume_would_be_noticed(harness, straight, tmp_path, mutant):
    """Each mutant fails to restore one thing, and the comparison above notices it (also T7)."""
    whole = straight("16 bits")
    run = stopped_at(whole, 6, tmp_path / "run")
    if mutant == "log_kept":
        text = (whole / "log.jsonl").read_text()
        (run / "log.jsonl").write_text(text)
    answer = go_on(harness, run, mutant=mutant)
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(whole), outcome(run))


def moments(count: int, seconds: float) -> list[float]:
    generator = random.Random(5)
    return [generator.uniform(0.05, 1.0) * seconds for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "code", "count"), [("SIGKILL", -9, 10), ("SIGTERM", 143, 10), ("SIGINT", 130, 4)]
)
def test_a_signal_at_any_moment_loses_nothing(
    harness, straight, tiny_model, rows, tmp_path, name, code, count
):
    """T12, T13, T14: signals come at random moments; SIGTERM and Ctrl-C first save the last finished step."""
    whole = straight("16 bits")
    expected, seconds = (
        outcome(whole),
        harness.run("finetune", flags(tiny_model, rows, tmp_path / "t"))["seconds"],
    )

    def cell(item: tuple[int, float]) -> float:
        number, delay = item
        run = tmp_path / str(number)
        for _ in range(4):  # a run that ends before its signal comes is repeated with an earlier signal
            shutil.rmtree(run, ignore_errors=True)
            settings = flags(tiny_model, rows, run, save_steps=100)
            answer = harness.run("finetune", settings, signals=[[delay, name]])
            if answer["code"] not in (0, code) and not run.exists() and not answer["said"]:
                delay *= 3  # it ended before it had begun, and before it watched for signals
                continue
            assert answer["code"] in (0, code), answer["said"]
            if answer["code"]:
                break
            delay /= 2
        assert answer["code"] == code, answer["said"]
        if code != -9 and not (run / "finished.json").exists() and list(run.glob("checkpoint-*")):
            logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
            assert max(runs_folder.checkpoint_steps(run)) == max(logged, default=0)
            assert "finetune_continue.py --output_path" in answer["said"]
        assert not (run / ".lock").exists() or code == -9
        has_begun = (run / "finetune_config.json").exists()
        new_options = {"output_path": run} if has_begun else flags(tiny_model, rows, run)
        again = harness.run("finetune_continue" if has_begun else "finetune", new_options)
        assert again["code"] == 0, again["said"]
        assert differences(expected, outcome(run)) == [], answer["said"] + again["said"]
        return answer["seconds"] - delay

    assert max(harness.map(cell, list(enumerate(moments(count, seconds))))) < 5


def test_a_signal_within_an_update_waits_for_its_end(harness, straight, tiny_model, rows, tmp_path):
    """T12: no signal stops a run between an update and its record, and it can go on bit for bit."""
    whole = straight("16 bits")
    promises.a_signal_within_an_update_waits_for_its_end(harness, whole, tiny_model, rows, tmp_path)


def test_a_second_ctrl_c_leaves_at_once(harness, tiny_model, rows, tmp_path):
    """T13: a second Ctrl-C ends a slow save with exit code 130; earlier checkpoints stay whole."""
    run = tmp_path / "run"
    settings = flags(tiny_model, rows, run, num_epochs=300, save_steps=10_000, test_size=0, batch_size=24)
    settings["max_steps"] = 500
    signals = [[4.0, "SIGINT"], [5.0, "SIGINT"]]
    answer = harness.run("finetune", {**settings, "eval_steps": 10_000}, signals=signals, slow_save=20)
    assert answer["code"] == 130, answer["said"]
    assert "saving slowly" in answer["said"]
    assert answer["seconds"] < 15
    newest, problems = runs_checkpoint.newest(run)
    assert newest is not None
    assert problems == []


def test_a_finished_run_is_left_as_it_is(harness, straight, tmp_path):
    """T11: continuing a finished run says that it is finished, and changes no file."""
    run = tmp_path / "run"
    shutil.copytree(straight("16 bits"), run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    answer = go_on(harness, run)
    assert answer["code"] == 0
    assert "finished" in answer["said"]
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_going_back_sets_later_steps_aside(harness, straight, tmp_path):
    """Continuing at an earlier checkpoint sets later ones aside and cuts the log; the result is the same."""
    whole = straight("16 bits")
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    answer = harness.run("finetune_continue", {"resume_from_checkpoint": run / "checkpoint-5"})
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(whole), outcome(run)) == []
    assert sorted(runs_folder.checkpoint_steps(run / "set-aside-1")) == list(range(6, 13))
    dropped = [json.loads(line)["step"] for line in (run / "log.dropped.jsonl").read_text().splitlines()]
    assert dropped == [6, 6, 7, 8, 9, 9, 10, 11, 12, 12]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.5),
        ("batch_size", 7),
        ("seed", 1),
        ("template", "other"),
        ("cutoff_len", 100),
        ("lora_r", 8),
        ("lora_alpha", 32),
        ("lora_target_modules", "all-linear"),
        ("optimizer", "adamw_8bit"),
        ("dtype", "bf16"),
        ("bits", 8),
        ("lr_scheduler", "cosine"),
        ("num_epochs", 1),
        ("test_size", 0),
        ("train_on_inputs", "true"),
    ],
)
def test_what_changes_the_result_is_refused(harness, straight, tmp_path, name, value):
    """T9: exit code 4 with the old and the new value of the option, and nothing is written."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    before = sorted(run.rglob("*"))
    answer = harness.run("finetune_continue", {"output_path": run, name: value})
    assert answer["code"] == 4, answer["said"]
    assert f"{name} " in answer["said"]
    assert f"-> {value}".lower() in answer["said"].lower()
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("what", ["append", "reorder", "one byte, same time", "tokenizer", "base", "config"])
def test_changed_rows_tokenizer_or_base_are_refused(harness, straight, tiny_model, rows, tmp_path, what):
    """D13, T9, T26: files are compared by their content, whatever their times say."""
    base, data = tmp_path / "base", tmp_path / "rows.json"
    shutil.copytree(tiny_model, base)
    shutil.copy(rows, data)
    run = tmp_path / "run"
    settings = flags(base, data, run, num_epochs=1)
    assert harness.run("finetune", settings, kill_in_step=[3, 0])["code"] == -9
    content = json.loads(data.read_text())
    status = data.stat()
    if what == "append":
        data.write_text(json.dumps([*content, content[0]]))
    elif what == "reorder":
        data.write_text(json.dumps(content[::-1]))
    elif what == "one byte, same time":
        data.write_text(data.read_text().replace("Say red 0", "Say rod 0"))
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif what == "tokenizer":
        path = base / "tokenizer.json"
        path.write_text(path.read_text() + " ")
    elif what == "base":
        path = base / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    else:
        path = base / "config.json"
        path.write_text(path.read_text() + " ")
    answer = go_on(harness, run)
    assert answer["code"] == 4, answer["said"]
    field = {"tokenizer": "tokenizer", "base": "base model", "config": "base model"}.get(what, "rows")
    assert re.search(rf"{field}( \(.*\))?: \w+ -> \w+", answer["said"])


def test_rows_and_base_may_move(harness, straight, tiny_model, rows, tmp_path):
    """A run goes on with rows and a base of the same content in another place."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    base, data = tmp_path / "base", tmp_path / "moved.json"
    shutil.copytree(tiny_model, base)
    shutil.copy(rows, data)
    moved = {"output_path": run, "model_path": base, "data_path": data}
    answer = harness.run("finetune_continue", moved)
    assert answer["code"] == 0, answer["said"]
    result = outcome(run)
    announcements = [record for record in result["log"] if "continued" in record]
    assert len(announcements) == 1
    result["log"].remove(announcements[0])
    assert differences(outcome(straight("16 bits")), result) == []


def test_execution_may_change(harness, tiny_model, rows, tmp_path):
    """Another micro-batch budget is announced and logged; without dropout losses differ by rounding alone."""
    steady = {"lora_dropout": 0, "eval_steps": 1000}
    assert harness.run("finetune", flags(tiny_model, rows, tmp_path / "whole", **steady))["code"] == 0
    run = stopped_at(tmp_path / "whole", 6, tmp_path / "run")
    answer = harness.run(
        "finetune_continue", {"output_path": run, "micro_batch_tokens": 300, "save_steps": 4}
    )
    assert answer["code"] == 0, answer["said"]
    assert "micro_batch_tokens 150 -> 300" in answer["said"]
    assert "same up to rounding, but the dropout masks differ" in answer["said"]
    assert any("continued" in record for record in outcome(run)["log"])
    assert json.loads((run / "finetune_config.json").read_text())["options"]["save_steps"] == 4
    losses = [
        [record["loss"] for record in outcome(folder)["log"] if "loss" in record]
        for folder in (tmp_path / "whole", run)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_budget_that_memory_has_lowered_stays_lowered(straight, tmp_path, monkeypatch):
    """Only who names another one gets it."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    read = runs_checkpoint.read_progress
    monkeypatch.setattr(
        runs_checkpoint, "read_progress", lambda path: dataclasses.replace(read(path), micro_batch_tokens=75)
    )
    for budget, tokens in ((None, 75), (150, 150), ("auto", 0)):  # 0: it is estimated again
        request = config_training.ContinueConfig(output_path=str(run), micro_batch_tokens=budget or 150)
        start = resume._same_run(run, None, request, frozenset({"micro_batch_tokens"} if budget else ()))
        assert start.progress.micro_batch_tokens == tokens


@pytest.mark.parametrize("begun_from", [None, "an adapter"])
def test_a_run_of_an_earlier_version_has_a_log_from_its_first_step(straight, tmp_path, begun_from):
    """It does not say where it began; one that began from an adapter may have begun at a later step."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    (run / "log.jsonl").write_text("")
    chosen = run / "checkpoint-6"
    start = StartingPoint(
        config_training.FinetuneConfig(),
        runs_checkpoint.read_progress(chosen),
        stored={"resolved": {}},
        begun_from=begun_from,
    )
    refusal = contextlib.nullcontext() if begun_from else pytest.raises(UserError, match="log")
    with refusal:
        resume._check_log(run, chosen, start)


def test_files_of_others_in_a_checkpoint_are_named(straight, tmp_path, capsys):
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    resume._verify_chosen(run / "checkpoint-6", run)
    assert capsys.readouterr().out == ""
    (run / "checkpoint-6" / "notes.txt").write_text("mine")
    resume._verify_chosen(run / "checkpoint-6", run)
    assert "notes.txt did not come from OneCard and is ignored" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "is_due"), [(599, False), (601, True)])
def test_a_checkpoint_is_due_after_ten_minutes(seconds, is_due):
    trainer = types.SimpleNamespace(
        progress=types.SimpleNamespace(step=5, rows_seen=30),
        plan=types.SimpleNamespace(
            options=types.SimpleNamespace(save_steps=1000),
            total_steps=1000,
            data=types.SimpleNamespace(train_rows=range(19)),
        ),
        strategy=types.SimpleNamespace(in_any=bool),
        saved=time.monotonic() - seconds,
    )
    assert loop.save_is_due(trainer) is is_due


def test_a_changed_start_is_saved_at_once(harness, straight, tmp_path):
    """After a kill right at the start, --from_data_beginning and another budget are remembered."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    wish = {"output_path": run, "from_data_beginning": True, "micro_batch_tokens": 300}
    assert harness.run("finetune_continue", wish, kill_in_step=[1, 0])["code"] == -9
    progress = runs_checkpoint.read_progress(runs_checkpoint.newest(run)[0])
    assert (progress.step, progress.rows_seen, progress.micro_batch_tokens) == (6, 0, 300)
    assert not list(run.glob(".replaced*"))
    assert go_on(harness, run)["code"] == 0
    steps = [record for record in outcome(run)["log"] if "loss" in record]
    assert [record["rows_seen"] for record in steps[6:8]] == [6, 12]


def test_a_new_run_from_an_adapter_can_be_killed_at_once(harness, straight, tiny_model, rows, tmp_path):
    """The first checkpoint of a new run holds the adapter it starts from, and is saved before any step."""
    wish = flags(
        tiny_model, rows, tmp_path / "new", resume_from_checkpoint=straight("16 bits") / "checkpoint-6"
    )
    wish = {name: wish[name] for name in ("data_path", "output_path", "resume_from_checkpoint")}
    assert harness.run("finetune_continue", wish, kill_in_step=[1, 0])["code"] == -9
    start = load_file(tmp_path / "new" / "checkpoint-6" / "adapter_model.safetensors")
    source = load_file(straight("16 bits") / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.equal(start[name], source[name]) for name in source)
    assert go_on(harness, tmp_path / "new")["code"] == 0
    shutil.rmtree(tmp_path / "new" / "checkpoint-6")
    for path in (tmp_path / "new").glob("checkpoint-*"):
        shutil.rmtree(path)
    (tmp_path / "new" / "finished.json").unlink()
    answer = go_on(harness, tmp_path / "new")
    assert answer["code"] == 4
    assert "stopped before its first save" in answer["said"]


def test_a_damaged_best_checkpoint_does_not_stop_the_end(harness, straight, tmp_path):
    """When the best checkpoint is damaged, the last adapter is published with a warning."""
    run = stopped_at(straight("16 bits"), 11, tmp_path / "run")
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(re.sub(r'("step": 9, "eval_loss": )[\d.]+', r"\g<1>0.5", text))
    (run / "checkpoint-9" / "adapter_model.safetensors").write_bytes(b"damaged")
    answer = go_on(harness, run)
    assert answer["code"] == 0, answer["said"]
    assert "the last one is used instead" in answer["said"]
    assert json.loads((run / "finished.json").read_text())["best_step"] == STEPS


@pytest.mark.parametrize("setting", ["lora_bias", "use_dora", "trainable_token_indices"])
def test_adapters_of_another_kind_are_refused(harness, straight, tiny_model, rows, tmp_path, setting):
    """An adapter whose kind changes its scale or its tensors is not trained as plain LoRA: exit code 4."""
    adapter = tmp_path / "adapter"
    shutil.copytree(straight("16 bits") / "checkpoint-12", adapter)
    (adapter / "manifest.json").unlink()
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**values, setting: True}))
    wish = flags(tiny_model, rows, tmp_path / "new", resume_from_checkpoint=adapter)
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 4
    assert setting in answer["said"]
    (adapter / "trainer_state.json").write_text('{"global_step": null}')  # now an older checkpoint
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 4
    assert setting in answer["said"]
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    answer = harness.run("finetune_continue", {**wish, "max_steps": 1})
    assert answer["code"] == 0, answer["said"]


def test_a_checkpoint_outside_of_its_run_is_checked_too(harness, straight, tiny_model, rows, tmp_path):
    """A copied checkpoint is a warm start with target names in any order, and a flipped bit is noticed."""
    adapter = tmp_path / "copied"
    shutil.copytree(straight("16 bits") / "checkpoint-12", adapter)
    wish = flags(tiny_model, rows, tmp_path / "new", resume_from_checkpoint=adapter, max_steps=1)
    wish["lora_target_modules"] = "v_proj,q_proj"
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 0, answer["said"]
    raw = bytearray((adapter / "adapter_model.safetensors").read_bytes())
    raw[-2] ^= 1
    (adapter / "adapter_model.safetensors").write_bytes(raw)
    answer = harness.run("finetune_continue", {**wish, "output_path": tmp_path / "other"})
    assert answer["code"] == 4
    assert "was changed after it was saved" in answer["said"]


def test_a_run_is_made_longer(harness, straight, tiny_model, rows, tmp_path):
    """T10: a finished run goes on for more epochs, with the learning rate by the documented rule."""
    run = tmp_path / "run"
    shutil.copytree(straight("16 bits"), run)
    answer = harness.run("finetune_continue", {"output_path": run, "num_epochs": 5})
    assert answer["code"] == 0, answer["said"]
    assert "12 -> 20 steps" in answer["said"]
    rates = [record["learning_rate"] for record in outcome(run)["log"] if "loss" in record]
    assert len(rates) == 20
    assert rates[12:] == pytest.approx([1e-2 * (20 - done) / 18 for done in range(12, 20)])
    assert json.loads((run / "finished.json").read_text())["steps"] == 20
    assert harness.run("finetune_continue", {"output_path": run, "num_epochs": 5})["code"] == 0


def test_a_run_of_max_steps_is_made_longer_by_epochs(harness, tiny_model, rows, tmp_path):
    """The latest number of epochs counts, and --from_data_beginning needs steps that remain."""
    run = tmp_path / "run"
    assert harness.run("finetune", flags(tiny_model, rows, run, max_steps=2))["code"] == 0
    answer = harness.run("finetune_continue", {"output_path": run, "from_data_beginning": True})
    assert answer["code"] == 2
    assert "no step is left" in answer["said"]
    answer = harness.run("finetune_continue", {"output_path": run, "num_epochs": 1})
    assert answer["code"] == 0, answer["said"]
    assert "The run is made longer: 2 -> 4 steps" in answer["said"]
    assert "bit for bit" not in answer["said"]  # nothing but the length has changed


@pytest.mark.parametrize(
    ("name", "is_named_twice"), [(".", False), (".", True), (f"checkpoint-{STEPS - 1}", True)]
)
def test_the_folder_of_a_run_is_a_way_to_name_it(harness, straight, tmp_path, name, is_named_twice):
    """--resume_from_checkpoint with it means the same run, and so does its own --output_path beside it."""
    run = stopped_at(straight("16 bits"), STEPS - 1, tmp_path / "run")
    wish = {"resume_from_checkpoint": run / name} | ({"output_path": run} if is_named_twice else {})
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(straight("16 bits")), outcome(run)) == []


@pytest.mark.parametrize(("given", "taken"), [({"dtype": "bf16"}, "bf16"), ({"dtype": "auto"}, "fp32")])
def test_other_rows_in_another_compute_dtype(monkeypatch, given, taken):
    """A dtype that was named is used; with auto the earlier one stays."""
    options = config_training.FinetuneConfig(**given, device="cpu")
    resolved = {"dtype": "fp32", "gradient_checkpointing": False}
    earlier_dtype = resume._resolved_before(options, resolved).get("dtype")
    assert (earlier_dtype or options.dtype) == taken


def test_rows_from_the_beginning(harness, straight, tmp_path):
    """--from_data_beginning starts the rows anew, while step, rate and optimizer go on."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    answer = harness.run("finetune_continue", {"output_path": run, "from_data_beginning": True})
    assert answer["code"] == 0, answer["said"]
    steps = [record for record in outcome(run)["log"] if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert steps[6]["rows_seen"] == 6
    assert steps[6]["tokens"] == steps[0]["tokens"]
    whole = [record for record in outcome(straight("16 bits"))["log"] if "loss" in record]
    assert [record["learning_rate"] for record in steps] == [record["learning_rate"] for record in whole]


@pytest.mark.parametrize(("new_epochs", "total"), [(2, 12), (5, 20)])
def test_other_rows_go_on_with_optimizer_and_rate(
    harness, straight, tiny_model, rows, tmp_path, new_epochs, total
):
    """The larger of both plans counts; optimizer and rate go on, and the new rows begin at the first.

    After 6 of 12 steps, 2 of them warm-up, the rate is 0.6 of the highest, whatever the number of new rows.
    """
    other = tmp_path / "other.json"
    other.write_text(json.dumps(tiny.rows(48)[24:]))
    wish = {"resume_from_checkpoint": straight("16 bits") / "checkpoint-6", "data_path": other}
    wish |= {"output_path": tmp_path / "new", "num_epochs": new_epochs}
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 0, answer["said"]
    steps = [record for record in outcome(tmp_path / "new")["log"] if "loss" in record]
    assert [record["step"] for record in steps] == list(range(7, total + 1))
    assert steps[0]["rows_seen"] == 6
    rates = [6e-3 * (total - done) / (total - 6) for done in range(6, total)]
    assert [record["learning_rate"] for record in steps] == pytest.approx(rates)
    moved = load_file(tmp_path / "new" / "checkpoint-6" / "optimizer.safetensors")
    original = load_file(straight("16 bits") / "checkpoint-6" / "optimizer.safetensors")
    assert all(torch.equal(moved[name], original[name]) for name in original)


def test_other_rows_forget_the_adapter_that_the_run_before_began_from(
    harness, straight, tiny_model, rows, tmp_path
):
    """The run before records a fingerprint of it; the new run begins from a checkpoint of that run."""
    first, second = tmp_path / "first", tmp_path / "second"
    begun = flags(tiny_model, rows, first, lora_path=straight("16 bits"), max_steps=1)
    assert harness.run("finetune", begun)["code"] == 0
    other = tiny.save_rows(tmp_path / "other.json", 12)
    wish = {"resume_from_checkpoint": first / "checkpoint-1", "data_path": other, "output_path": second}
    answer = harness.run("finetune_continue", {**wish, "max_steps": 2})
    assert answer["code"] == 0, answer["said"]
    prints = [
        json.loads((run / "finetune_config.json").read_text())["fingerprints"] for run in (first, second)
    ]
    assert "starting adapter" in prints[0]
    assert "starting adapter" not in prints[1]


def test_other_rows_need_the_same_adapter(harness, straight, rows, tmp_path):
    """Options on which optimizer and rate depend cannot change: exit code 4."""
    wish = {"resume_from_checkpoint": straight("16 bits"), "data_path": rows, "output_path": tmp_path / "new"}
    answer = harness.run("finetune_continue", {**wish, "lora_r": 16})
    assert answer["code"] == 4
    assert "lora_r 4 -> 16" in answer["said"]
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 2
    assert "All 12 planned steps are done" in answer["said"]
    assert not (tmp_path / "new").exists()


def test_an_adapter_alone_is_a_warm_start(harness, straight, tiny_model, rows, tmp_path):
    """From an adapter only weights and shape are used, everything else is new, and the output says so."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(straight("16 bits") / name, adapter / name)
    settings = flags(tiny_model, rows, tmp_path / "new", max_steps=1, learning_rate=1e-9)
    del settings["lora_r"]
    answer = harness.run("finetune_continue", {**settings, "resume_from_checkpoint": adapter})
    assert answer["code"] == 0, answer["said"]
    assert "Warm start" in answer["said"]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "new"))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    log = outcome(tmp_path / "new")["log"]
    best = min(record["eval_loss"] for record in outcome(straight("16 bits"))["log"] if "eval_loss" in record)
    assert log[0]["eval_loss"] == pytest.approx(best, rel=1e-5)
    answer = harness.run("finetune_continue", {**settings, "resume_from_checkpoint": adapter, "lora_r": 9})
    assert answer["code"] == 4
    assert "lora_r 4 -> 9" in answer["said"]


def test_an_adapter_from_the_hub_is_a_warm_start(straight, tiny_model, rows, tmp_path):
    """--lora_remote_checkpoint fetches only the adapter's files; an unknown name gives one clear error."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(straight("16 bits") / name, adapter / name)
    (adapter / "handler.py").write_text("raise SystemExit")
    settings = flags(tiny_model, rows, tmp_path / "new", max_steps=1, learning_rate=1e-9)
    del settings["lora_r"]
    home = tmp_path / "home"
    with fake_hub.serving("someone/adapter", adapter) as address:
        missing = fake_hub.fetch(address, home, "fetch_adapter", "someone/nothing")
        values = {**settings, "lora_remote_checkpoint": "someone/adapter"}
        command = [sys.executable, "finetune_continue.py", *(f"--{k}={v}" for k, v in values.items())]
        hub = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        ended = subprocess.run(command, cwd=ROOT, env={**os.environ, **hub}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert missing.startswith("someone/nothing: no such folder here")
    assert "Warm start" in ended.stdout
    assert not list(home.rglob("handler.py"))
    values, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "new"))
    assert all(torch.allclose(values[name], after[name], atol=1e-6) for name in values)


def test_two_trainers_do_not_share_a_folder(harness, tiny_model, rows, tmp_path):
    """T22: the second trainer is refused with exit code 2, and the first one is not disturbed."""
    run = tmp_path / "run"
    settings = flags(tiny_model, rows, run, num_epochs=300, save_steps=10_000)

    def start(delay: float) -> dict:
        time.sleep(delay)
        return harness.run("finetune", settings, signals=[[4 - delay, "SIGTERM"]])

    first, second = harness.map(start, (0, 2.5))
    assert first["code"] == 143, first["said"]
    assert second["code"] == 2, second["said"]
    assert "is training there" in second["said"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harness, straight, tmp_path):
    """C8: the damaged checkpoint is named and set aside, and the result is that of the straight run."""
    run = stopped_at(straight("16 bits"), 6, tmp_path / "run")
    path = run / "checkpoint-6" / "optimizer.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    chosen = harness.run("finetune_continue", {"resume_from_checkpoint": run / "checkpoint-6"})
    assert chosen["code"] == 4
    assert "checkpoint-5" in chosen["said"]
    answer = go_on(harness, run)
    assert answer["code"] == 0, answer["said"]
    assert "damaged" in answer["said"]
    assert "checkpoint-6/optimizer.safetensors" in answer["said"]
    assert differences(outcome(straight("16 bits")), outcome(run)) == []
    assert (run / "set-aside-1" / "checkpoint-6").is_dir()


def test_every_checkpoint_is_a_peft_adapter(straight, tiny_model):
    """peft loads every checkpoint, also the first one, whose adapter has no effect yet."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in ("checkpoint-0", "checkpoint-12"):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert PeftModel.from_pretrained(base, straight("16 bits") / name)


def test_nothing_to_go_on_from_is_said(harness, tiny_model, rows, tmp_path):
    """A folder without a run, a missing folder and a folder without checkpoints each give one message."""
    answer = harness.run("finetune_continue", {"output_path": tmp_path / "none"})
    assert (answer["code"], "holds no run" in answer["said"]) == (4, True)
    answer = harness.run("finetune_continue", {"resume_from_checkpoint": tmp_path / "none"})
    assert (answer["code"], "no such folder" in answer["said"]) == (4, True)
    answer = harness.run(
        "finetune_continue", {"resume_from_checkpoint": tmp_path, "output_path": tmp_path / "x"}
    )
    assert (answer["code"], "holds neither a checkpoint nor an adapter" in answer["said"]) == (4, True)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_at_least_every_ten_minutes(tiny_model, rows, tmp_path, monkeypatch):
    """Time alone leads to a checkpoint when no step, epoch or evaluation does."""
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    settings = flags(tiny_model, rows, tmp_path / "run", max_steps=3, save_steps=1000, eval_steps=1000)
    settings = {**settings, "test_size": 0}
    options = config_options.build(config_training.FinetuneConfig, {k: str(v) for k, v in settings.items()})
    loop.run(options, sample=lambda *_: [], draw=lambda *_: None)
    assert sorted(runs_folder.checkpoint_steps(tmp_path / "run")) == [0, 1, 2, 3]


def test_training_goes_on_when_its_terminal_is_gone(tiny_model, rows, tmp_path):
    """T23: after its terminal is closed, a run finishes and its log is whole."""
    run, (near, far) = tmp_path / "run", pty.openpty()
    fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    arguments = [f"--{key}={value}" for key, value in flags(tiny_model, rows, run, num_epochs=5).items()]
    process = subprocess.Popen(
        [sys.executable, "finetune.py", *arguments],
        cwd=ROOT,
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(far)
    output = b""
    while b"step 2/" not in output:
        output += os.read(near, 4096)
    os.close(near)
    assert process.wait(timeout=120) == 0
    assert (run / "finished.json").exists()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 20


def test_several_processes_stop_and_go_on_as_one(tiny_model, rows, tmp_path):
    """After SIGTERM to torchrun, which saves, one process announces that it goes on with the same losses."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    steady = {"lora_dropout": 0, "num_epochs": 3, "save_steps": 1000, "eval_steps": 1000}
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder, start in (
        (whole, []),
        (run, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        arguments = [f"--{key}={value}" for key, value in flags(tiny_model, rows, folder, **steady).items()]
        command = [sys.executable, *start, "finetune.py", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        if start:
            until = time.monotonic() + 120
            while '"loss"' not in ((run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""):
                assert time.monotonic() < until
                time.sleep(0.01)
            process.terminate()
        assert (process.wait(timeout=120) == 0) == (not start)
    newest, _ = runs_checkpoint.newest(run)
    logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert int(newest.name.removeprefix("checkpoint-")) == max(logged) > 0
    assert not list(run.glob(".saving*"))
    command = [sys.executable, "finetune_continue.py", "--output_path", str(run)]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "processes 2 -> 1" in result.stdout
    losses = [
        [
            json.loads(line)["loss"]
            for line in (folder / "log.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for folder in (whole, run)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("before", "now", "device", "taken"),
    [
        ("bf16", "fp16", "cuda:0", "fp16"),
        ("fp16", "bf16", "cuda:0", "bf16"),
        ("bf16", "fp32", "cpu", "bf16"),
        ("fp32", "bf16", "cuda:0", "fp32"),
    ],
)
def test_auto_dtype_changes_with_the_gpu_only(monkeypatch, before, now, device, taken):
    """With auto, bf16 and fp16 follow the card; anything else stays as it was."""
    monkeypatch.setattr(hardware, "choose_device", lambda *_: hardware.Choice(device, ""))
    monkeypatch.setattr(hardware, "choose_dtype", lambda *_: hardware.Choice(now, ""))
    resolved = {"dtype": before, "gradient_checkpointing": False}
    assert resume._resolved_before(config_training.FinetuneConfig(), resolved).get("dtype", now) == taken


def test_a_stop_within_the_last_evaluation(harness, straight, tiny_model, rows, tmp_path):
    """A missing evaluation of the last step is made when the run goes on, and counts for the best step."""
    whole = straight("16 bits")
    run = stopped_at(whole, STEPS, tmp_path / "run")
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    assert "eval_loss" in lines[-1]
    (run / "log.jsonl").write_text("".join(lines[:-1]))
    answer = go_on(harness, run)
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(whole), outcome(run)) == []
    best = [json.loads((folder / "finished.json").read_text())["best_step"] for folder in (whole, run)]
    assert best == [STEPS, STEPS]
