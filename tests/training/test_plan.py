"""The plan of a run: its steps and rows, what must stay the same, room on the disk, and what is printed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from onecard.data import examples as data_examples
from onecard.errors import UserError
from onecard.system import files as system_files
from onecard.system import hashing
from onecard.training.plan import LEAST_ROOM, Plan, describe, prepare
from tests.support import tiny
from tests.support.small_runs import options


@pytest.fixture
def rows(tmp_path) -> Path:
    return tiny.save_rows(tmp_path / "rows.json", 24)


@pytest.fixture
def plan_of(tiny_model, rows, tmp_path):
    """A function from changed options to the plan of a run on 24 rows."""

    def plan_of(data_path: Path = rows, **changes) -> Plan:
        return prepare(options(tiny_model, data_path, tmp_path / "run", **changes))

    return plan_of


@pytest.mark.parametrize("batch_size", [1, 4, 6, 7, 19, 30])
def test_rows_after_some_steps_are_those_that_training_takes(plan_of, batch_size):
    """The last step of an epoch may be smaller, wherever the count begins."""
    plan = plan_of(batch_size=batch_size)
    seen = [0]
    for _ in range(3 * plan.steps_per_epoch + 1):
        seen.append(seen[-1] + len(data_examples.rows_at(42, seen[-1], batch_size, 19)))
    assert plan.steps_per_epoch == seen.index(19)
    for first, rows_seen in enumerate(seen):
        assert [plan.rows_after(n, rows_seen) for n in range(len(seen) - first)] == seen[first:]


@pytest.mark.parametrize(
    ("changes", "total"),
    [({}, 8), ({"num_epochs": 3}, 12), ({"num_epochs": 1.2}, 5), ({"max_steps": 7, "num_epochs": 3}, 7)],
)
def test_steps_of_a_run(plan_of, changes, total):
    """19 rows in steps of 6 make 4 steps an epoch; a part of a step is a step."""
    assert plan_of(**changes).total_steps == total


def test_the_warm_up_is_a_share_of_the_steps_or_a_number_of_them(plan_of):
    """A number is at most a fifth of the steps, and a share is rounded up."""
    asked = [{"warmup_steps": 1}, {"warmup_steps": 2}, {"warmup_steps": 50}, {"warmup_ratio": 0.07}]
    steps = [plan_of(max_steps=100 if "warmup_ratio" in one else 10, **one).warmup_steps for one in asked]
    assert steps == [1, 2, 2, 7]
    assert plan_of(max_steps=10, warmup_ratio=0.41, warmup_steps=1).warmup_steps == 5


def test_room_for_three_checkpoints_is_looked_for(plan_of, tmp_path, monkeypatch):
    """Weights and two moments in fp32, for the best, the newest and an unfinished checkpoint."""
    rooms = []
    monkeypatch.setattr(system_files, "check_room", lambda folder, size: rooms.append((folder, size)))
    plan = plan_of(lora_r=4, lora_target_modules="q_proj,v_proj")
    weights = 2 * (4 * (96 + 96) + 4 * (96 + 32))  # two layers; 32 = 4 key/value heads of 8
    assert plan.shape.r == 4
    assert rooms == [(tmp_path / "run", LEAST_ROOM), (tmp_path / "run", LEAST_ROOM + 3 * 3 * 4 * weights)]


def test_what_auto_became_is_used_again(tiny_model, rows, tmp_path):
    settings = options(tiny_model, rows, tmp_path / "run", dtype="auto", gradient_checkpointing="auto")
    new = prepare(settings)
    assert not new.checkpointing
    again = prepare(settings, resolved={"dtype": "fp16", "gradient_checkpointing": True})
    assert (again.dtype, again.checkpointing) == ("fp16", True)
    assert again.reasons["dtype"] == again.reasons["checkpointing"] == "as when the run began"
    assert again.reasons["device"] == new.reasons["device"]
    off = prepare(settings, resolved={"gradient_checkpointing": False})  # off is an answer too
    assert off.reasons["checkpointing"] == "as when the run began"
    assert off.reasons["dtype"] == new.reasons["dtype"]


def test_what_must_stay_the_same_is_recorded(plan_of, tiny_model, tmp_path):
    """Rows, tokenizer, base model, and the contents of a file of adapter settings if one is used."""
    plain = plan_of().fingerprints
    assert set(plain) == {"rows", "encoded rows", "tokenizer", "base model"}
    assert plain["base model"] != plain["tokenizer"]
    settings = tmp_path / "peft.json"
    settings.write_text(json.dumps({"use_rslora": True}))
    changed = plan_of(peft_config=str(settings)).fingerprints
    assert changed == {**plain, "adapter settings": hashing.of_file(settings)}


def test_what_is_chosen_is_printed_with_its_reason(plan_of, tmp_path, capsys):
    plan = plan_of(cutoff_len=170, batch_size=6, num_epochs=2, learning_rate=3e-4, warmup_steps=100)
    describe(plan)
    lines = capsys.readouterr().out.splitlines()
    lengths = np.sort(plan.data.examples.lengths)
    encoding = plan.data.encoding
    assert encoding.cut > 0
    assert lines[:5] == [
        "device      cpu: asked for",
        "dtype       computation in fp32: asked for; trained weights and optimizer in fp32",
        "base        16 bits",
        f"activations gradient checkpointing is off: {plan.reasons['checkpointing']}",
        f"rows        {len(plan.data.train_rows)} to train on, 5 for validation; {lengths.sum()} tokens, "
        f"median {int(np.median(lengths))}, longest {lengths[-1]}",
    ]
    assert lines[5:7] == [
        f"            of 24 rows, {encoding.cut} were cut at 170 tokens, {encoding.dropped} were dropped "
        "(no target left) and 0 rejected",
        "            an answer that is cut short has no end token; --long_rows drop leaves such rows out",
    ]
    per_epoch = -(-len(plan.data.train_rows) // 6)
    assert lines[7:9] == [
        f"steps       {2 * per_epoch} of 6 rows ({per_epoch} an epoch), learning rate 0.0003 linear, "
        f"warm-up {2 * per_epoch // 5} steps",
        f"            a short run: {2 * per_epoch // 5} warm-up steps, not 100 (at most one step in 5)",
    ]
    assert not any("warning" in line or line.startswith("files") for line in lines)


def printed(plan: Plan, capsys) -> str:
    capsys.readouterr()
    describe(plan)
    return capsys.readouterr().out


def test_three_rows_are_shown_with_their_targets_marked(plan_of, capsys):
    shown = printed(plan_of(), capsys).split("\nThree rows as the model sees them.")[1]
    rule = "-" * 60 + "\n"
    assert shown.count(rule) == 4
    assert shown.endswith(rule)
    rows_shown = shown.split(rule)[1:4]
    assert all(re.search(r"### Response:\n«[a-z ]+<end>»\n$", row) for row in rows_shown)
    assert len(set(rows_shown)) == 3


def test_only_a_run_with_a_full_warm_up_says_nothing_about_it(plan_of, capsys):
    for changes in ({"warmup_steps": 1}, {"warmup_steps": 0}, {"warmup_ratio": 0.5, "warmup_steps": 99}):
        assert "short run" not in printed(plan_of(**changes), capsys)


def test_uncut_rows_need_no_advice_about_their_ends(plan_of, capsys):
    assert "no end token" not in printed(plan_of(), capsys)


def test_several_files_are_counted_and_their_weights_named(plan_of, rows, tmp_path, capsys):
    other = tiny.save_rows(tmp_path / "other.json", 6)
    more = tiny.save_rows(tmp_path / "more.json", 5)
    paths = f"{rows},{other}:2"
    assert "\nfiles       2 to train on, 0 for validation, other.json x 2\n" in printed(
        plan_of(data_path=paths), capsys
    )
    assert "\nfiles       2 to train on, 1 for validation, other.json x 2\n" in printed(
        plan_of(data_path=paths, eval_data_path=str(more), test_size=0), capsys
    )


def test_validation_rows_that_are_training_rows_are_warned_about(plan_of, rows, tmp_path, capsys):
    text = printed(plan_of(eval_data_path=str(rows), test_size=0), capsys)
    assert "warning: 24 validation rows are training rows too." in text


def test_an_overlap_is_for_raw_text(plan_of, tmp_path, capsys):
    """Raw text is counted in blocks; other rows have no overlap, and that is said."""
    warning = "--overlap is for raw text"
    assert warning not in printed(plan_of(), capsys)
    assert warning in printed(plan_of(overlap=4), capsys)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "red green blue small large warm cold old new quick slow. " * 60}))
    blocks = printed(plan_of(data_path=text, cutoff_len=40, overlap=4, test_size=2), capsys)
    assert re.search(r"^blocks of raw text \d+ to train on, 2 for validation", blocks, re.MULTILINE)
    assert warning not in blocks


def test_options_of_an_adapter_that_is_not_trained_are_named(plan_of, capsys):
    """LoRA's options have no effect when only embeddings are trained."""
    warning = "these options have no effect without LoRA"
    assert warning not in printed(plan_of(lora_r=4), capsys)
    assert warning not in printed(plan_of(train_what="embeddings"), capsys)
    assert f"{warning}: --lora_r." in printed(plan_of(train_what="embeddings", lora_r=4), capsys)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_is_named(plan_of, capsys, bits):
    text = printed(plan_of(bits=bits), capsys)
    assert f"\nbase        {bits} bits by bitsandbytes, dequantised for each product\n" in text


@pytest.mark.parametrize(("settings", "words"), [({"bits": 4}, "4 bits by gptq"), ({}, "gptq")])
def test_a_base_that_is_quantised_already_is_named(plan_of, capsys, settings, words):
    plan = plan_of()
    plan.base_config.quantization_config = {"quant_method": "gptq", **settings}
    assert f"\nbase        {words}\n" in printed(plan, capsys)


def test_checkpointing_is_said_to_be_on(plan_of, capsys):
    assert "gradient checkpointing is on: " in printed(plan_of(gradient_checkpointing="on"), capsys)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_what": "full", "bits": 8}, "weights of 8 bits cannot be trained"),
        ({"overlap": 256}, "--overlap 256 must be less than --cutoff_len 256"),
        ({"overlap": 300}, "--overlap 300 must be less than --cutoff_len 256"),
        ({"template": "alpaca,nonesuch"}, "nonesuch"),
    ],
)
def test_options_that_exclude_each_other_are_refused(plan_of, changes, words):
    with pytest.raises(UserError, match=words):
        plan_of(**changes)


def test_an_unknown_template_is_refused_before_a_model_is_looked_for(tiny_model, rows, tmp_path):
    """Looking for it could download it."""
    with pytest.raises(UserError, match="nonesuch"):
        prepare(options("someone/model", rows, tmp_path / "run", template="nonesuch"), None)


def test_a_plan_writes_nothing(plan_of, tmp_path):
    plan_of()
    assert not (tmp_path / "run").exists()
