"""Older checkpoints: written by transformers' Trainer here, or with the layout of Chinese-Vicuna."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from onecard.errors import UserError
from onecard.runs import legacy
from tests.support import tiny
from tests.support.faults import Touch

RANK, ALPHA, TARGETS = 4, 12, ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory) -> Path:
    """A folder that the Trainer wrote after 3 of 6 planned steps."""
    return write(tiny_model, tmp_path_factory.mktemp("trainer"), "adamw_torch")


@pytest.fixture(scope="module")
def written_8bit(tiny_model, tmp_path_factory) -> Path:
    """The same folder with the optimizer of bitsandbytes."""
    return write(tiny_model, tmp_path_factory.mktemp("trainer8"), "adamw_bnb_8bit")


def write(tiny_model: Path, place: Path, optimizer: str) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    ids = [torch.randint(2, 300, (12,), generator=torch.Generator().manual_seed(i)) for i in range(24)]
    arguments = TrainingArguments(
        output_dir=str(place),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=3,
        optim=optimizer,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=adapted, args=arguments, train_dataset=[{"input_ids": x, "labels": x} for x in ids]).train()
    return place / "checkpoint-3"


def vicuna(written: Path, folder: Path) -> Path:
    """The same content as Chinese-Vicuna stored it: pickled weights and no adapter_config.json."""
    shutil.copytree(written, folder)
    torch.save(load_file(written / "adapter_model.safetensors"), folder / "pytorch_model.bin")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
    return folder


def flags(tiny_model, tmp_path, **changes) -> dict:
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    settings = {
        "bits": 16,
        "dtype": "fp32",
        "device": "cpu",
        "batch_size": 4,
        "num_epochs": 1,
        "test_size": 0,
    }
    settings |= {"model_path": tiny_model, "data_path": rows, "output_path": tmp_path / "run"}
    return {**settings, "learning_rate": 1e-2, "warmup_steps": 0, "save_steps": 1, **changes}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("layout", "kind"), [("trainer", "written"), ("vicuna", "written"), ("trainer", "written_8bit")]
)
def test_an_older_checkpoint_goes_on(harness, request, tiny_model, tmp_path, layout, kind):
    """Weights, moments, schedule and step are used, and the output says so; the folder does not change."""
    written = request.getfixturevalue(kind)
    source = written if layout == "trainer" else vicuna(written, tmp_path / "old")
    before = content(source)
    wish = flags(tiny_model, tmp_path, resume_from_checkpoint=source)
    if layout == "vicuna":
        wish["lora_alpha"] = ALPHA
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 0, answer["said"]
    output = answer["said"]
    assert "weights, optimizer, step go on; loss scale start anew" in output
    assert "rank 4 and targets q_proj,v_proj come from its tensors" in output
    assert ("does not say its alpha" in output) == (layout == "vicuna")
    assert "starts fresh" not in output
    assert content(source) == before

    run = tmp_path / "run"
    start = load_file(run / "checkpoint-3" / "adapter_model.safetensors")
    old = load_file(written / "adapter_model.safetensors")
    assert start.keys() == old.keys()
    assert all(torch.equal(start[name], old[name]) for name in old)
    moments = load_file(run / "checkpoint-3" / "optimizer.safetensors")
    saved = torch.load(written / "optimizer.pt", weights_only=True)["state"]
    for number, state in saved.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(moments[f"{number}.{key}"].flatten(), value.flatten()), (number, key)
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [4, 5, 6]
    assert [record["learning_rate"] for record in steps] == pytest.approx([1e-2 * k / 6 for k in (3, 2, 1)])
    assert [record["rows_seen"] for record in steps] == [16, 20, 24]
    stored = json.loads((run / "finetune_config.json").read_text())["options"]
    assert (stored["lora_r"], stored["lora_alpha"]) == (RANK, ALPHA)


def test_an_older_checkpoint_goes_on_with_the_first_row(harness, written, tiny_model, tmp_path):
    """With --from_data_beginning only the position in the rows is new."""
    wish = flags(tiny_model, tmp_path, resume_from_checkpoint=written, from_data_beginning=True)
    answer = harness.run("finetune_continue", wish)
    assert answer["code"] == 0, answer["said"]
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [4, 5, 6]
    assert [record["rows_seen"] for record in steps] == [4, 8, 12]


def at_step(source: Path, step: int, planned: int, rate: float, updates: int | None = None) -> Path:
    """Let an older checkpoint be that of a later step of a longer plan; updates: steps not skipped."""
    state = json.loads((source / "trainer_state.json").read_text())
    state |= {"global_step": step, "max_steps": planned}
    (source / "trainer_state.json").write_text(json.dumps(state))
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    for values in saved["state"].values():
        values["step"] = torch.tensor(float(updates or step))
    saved["param_groups"][0]["lr"] = rate
    torch.save(saved, source / "optimizer.pt")
    return source


@pytest.mark.parametrize(
    ("step", "updates", "rate"),
    [(10, 10, 3e-5), (10, 8, 2.4e-5)],
    ids=["in the warm-up", "after two skipped steps"],
)
def test_the_learning_rate_goes_on_whatever_the_new_rows(
    harness, written, tiny_model, tmp_path, step, updates, rate
):
    """1,000 steps were planned, 100 of them warm-up, and the new rows alone would give 30 steps."""
    source = at_step(vicuna(written, tmp_path / "old"), step, 1000, rate, updates)
    wish = {"resume_from_checkpoint": source, "learning_rate": 3e-4, "warmup_steps": 100, "num_epochs": 5}
    answer = harness.run("finetune_continue", flags(tiny_model, tmp_path, **wish), kill_in_step=[3, 0])
    assert answer["code"] == -9, answer["said"]
    assert "It keeps 1000" in answer["said"]
    assert "was to go on with" not in answer["said"]
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [step + 1]
    assert records[0]["learning_rate"] == pytest.approx(rate)


def test_the_optimizer_says_the_next_learning_rate(written):
    """After 3 of 6 steps without warm-up it is half of the highest, and no step was skipped."""
    old = legacy.read(written)
    assert (old.step, old.updates, old.planned_steps) == (3, 3, 6)
    assert old.next_rate == pytest.approx(5e-3)


def test_moments_that_do_not_fit_start_fresh(harness, written, tiny_model, tmp_path):
    """Moments of another model give a warning, and only the weights are used."""
    source = tmp_path / "old"
    shutil.copytree(written, source)
    saved = torch.load(source / "optimizer.pt", weights_only=True)
    for state in saved["state"].values():
        for inner in (state, *(value for value in state.values() if isinstance(value, dict))):
            for key in {"exp_avg", "state1"} & inner.keys():
                inner[key] = inner[key].flatten()[:5].clone()
    torch.save(saved, source / "optimizer.pt")
    answer = harness.run("finetune_continue", flags(tiny_model, tmp_path, resume_from_checkpoint=source))
    assert answer["code"] == 0, answer["said"]
    assert "it starts fresh" in answer["said"]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("adapter_model.bin", "torch"),
        ("pytorch_model.bin", "pickle"),
        ("optimizer.pt", "torch"),
        ("scaler.pt", "pickle"),
    ],
)
def test_a_hostile_file_is_refused_and_runs_nothing(harness, written, tiny_model, tmp_path, name, how):
    """C20, S1: the exit code is 8, with no canary and no run folder."""
    source, canary = vicuna(written, tmp_path / "old"), tmp_path / "canary"
    if name == "adapter_model.bin":
        (source / "pytorch_model.bin").unlink()
    payload = {"state": Touch(canary), "scale": Touch(canary)}
    if how == "torch":
        torch.save(payload, source / name)
    else:
        (source / name).write_bytes(pickle.dumps(payload, protocol=2))
    answer = harness.run("finetune_continue", flags(tiny_model, tmp_path, resume_from_checkpoint=source))
    assert answer["code"] == 8, answer["said"]
    assert name in answer["said"]
    assert "Traceback" not in answer["said"]
    assert not canary.exists()
    assert not (tmp_path / "run").exists()


def test_the_other_pickles_of_the_trainer_are_never_opened(harness, written, tiny_model, tmp_path):
    """rng_state.pth, training_args.bin and scheduler.pt are not needed, so their code cannot run."""
    source, canary = tmp_path / "old", tmp_path / "canary"
    shutil.copytree(written, source)
    for name in ("rng_state.pth", "training_args.bin", "scheduler.pt"):
        (source / name).write_bytes(pickle.dumps(Touch(canary)))
    answer = harness.run("finetune_continue", flags(tiny_model, tmp_path, resume_from_checkpoint=source))
    assert answer["code"] == 0, answer["said"]
    assert not canary.exists()


def test_damaged_and_empty_files(written, tmp_path):
    """An adapter without tensors and a file that was cut short give exit code 4 and are named."""
    source = vicuna(written, tmp_path / "old")
    torch.save({}, source / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no LoRA tensor") as caught:
        legacy.read(source)
    assert caught.value.code == 4
    raw = (written / "optimizer.pt").read_bytes()
    (source / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        legacy.read(source)


@pytest.mark.parametrize("what", ["a bit of a tensor", "a record called compressed"])
def test_damage_that_torch_does_not_see(tmp_path, what):
    """torch compares no checksum.

    For a record that is wrongly called compressed it returns memory that nobody wrote.
    """
    path = tmp_path / "x.bin"
    torch.save({"w": torch.arange(400.0)}, path)
    legacy.unpickle(path)
    raw = bytearray(path.read_bytes())
    if what == "a bit of a tensor":
        raw[raw.index(torch.arange(400.0).numpy().tobytes()) + 1000] ^= 1
    else:
        names = [place for place in range(len(raw)) if raw[place:].startswith(b"x/data/0")]
        raw[names[-1] - 46 + 10] = 8  # the record's compression method, in the directory after the records
    path.write_bytes(raw)
    torch.load(path, weights_only=True)  # it reports nothing
    with pytest.raises(UserError, match="cannot be read") as caught:
        legacy.unpickle(path)
    assert caught.value.code == 4


def test_a_file_without_checksums(tmp_path):
    """torch can leave out all checksums, and then nothing is compared. A single missing one is damage."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(400.0)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(legacy.unpickle(tmp_path / "x.bin")["w"], torch.arange(400.0))
    torch.save({"w": torch.arange(400.0)}, tmp_path / "x.bin")
    raw = bytearray((tmp_path / "x.bin").read_bytes())
    entry = next(
        entry for entry in zipfile.ZipFile(tmp_path / "x.bin").infolist() if "data/0" in entry.filename
    )
    place = raw.rindex(entry.CRC.to_bytes(4, "little"))  # in the directory after the records
    raw[place : place + 4] = bytes(4)
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(UserError, match="cannot be read"):
        legacy.unpickle(tmp_path / "x.bin")


def test_plain_values_come_through_the_child(tmp_path):
    """They are nested dictionaries with whole-number keys, lists and tensors of several types."""
    value = {
        "state": {0: {"a": torch.arange(3), "b": 1.5}, 1: {"c": [torch.ones(2, dtype=torch.uint8), None]}}
    }
    torch.save(value, tmp_path / "x.pt")
    got = legacy.unpickle(tmp_path / "x.pt")
    assert torch.equal(got["state"][0]["a"], torch.arange(3))
    assert got["state"][0]["b"] == 1.5
    assert got["state"][1]["c"][0].dtype == torch.uint8
    assert got["state"][1]["c"][1] is None
