"""What a path of --lora_path is found to be, by the files in the folder alone; no model is loaded."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from onecard.errors import UserError
from onecard.runs import adapters as runs_adapters
from tests.support.power_failure import save

LORA = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "someone/base"}


def write(folder: Path, config: dict | None = LORA, weights: bool = True) -> Path:
    """A folder with the two files of a peft adapter, or with one of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if weights:
        save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    return folder


def find(path: Path, which: str = "best") -> runs_adapters.Adapter:
    return runs_adapters.find(str(path), "one", which, keep=path.parent)


def test_an_adapter_of_peft(tmp_path):
    adapter = find(write(tmp_path / "adapter.v2"))
    assert (adapter.folder, adapter.origin) == (tmp_path / "adapter.v2", tmp_path / "adapter.v2")
    assert (adapter.whole, adapter.is_gguf, adapter.notes) == (False, False, [])
    assert adapter.base == adapter.record == "someone/base"
    assert (adapter.template, adapter.bits, adapter.fingerprints) == (None, None, {})


def test_another_kind_of_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a LoRA adapter"):
        find(write(tmp_path / "adapter", {**LORA, "peft_type": "IA3"}))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "adapter_config.json"])
def test_half_a_model_or_adapter_is_neither(tmp_path, name):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / name).write_text("{}")
    with pytest.raises(UserError) as caught:
        find(tmp_path / "half")
    assert caught.value.code == 4


def test_all_weights_of_a_model_are_a_whole_model(tmp_path):
    """In a folder of its own or in the folder `model` of a run."""
    for folder in (tmp_path / "alone", tmp_path / "run" / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("")
    assert (find(tmp_path / "alone").whole, find(tmp_path / "alone").folder) == (True, tmp_path / "alone")
    adapter = find(tmp_path / "run")
    assert (adapter.whole, adapter.folder) == (True, tmp_path / "run" / "model")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has not ended: checkpoints 2, 4 and 6, and step 4 was the best."""
    folder = tmp_path / "run"
    folder.mkdir()
    stored = {
        "options": {"model_path": "someone/base", "template": "alpaca, chatml", "bits": 4},
        "resolved": {"base": "someone/base@" + "a" * 40},
        "fingerprints": {"base model": "b" * 64},
    }
    (folder / "finetune_config.json").write_text(json.dumps(stored))
    losses = {2: 0.5, 4: 0.25, 6: 0.75}
    lines = [json.dumps({"step": step, "eval_loss": loss}) for step, loss in losses.items()]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for step in losses:
        save(folder, step)
    return folder


@pytest.mark.parametrize(
    ("which", "step", "words"), [("best", 4, "best so far"), ("newest", 6, "the newest")]
)
def test_a_run_that_has_not_ended(run, which, step, words):
    adapter = find(run, which)
    assert adapter.folder == run / f"checkpoint-{step}"
    assert adapter.notes == [
        f"{run} is not finished: checkpoint-{step} is used, {adapter.notes[0].split(', ')[-1]}"
    ]
    assert words in adapter.notes[0]


def test_where_the_best_is_damaged_the_newest_whole_one_is_used(run):
    for step, used in ((4, 6), (6, 2)):
        (run / f"checkpoint-{step}" / "optimizer.safetensors").write_text("")
        adapter = find(run)
        assert adapter.folder == run / f"checkpoint-{used}"
        assert "the newest" in adapter.notes[0]
    (run / "checkpoint-2" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        find(run)


@pytest.mark.parametrize("place", [".", "checkpoint-4"])
def test_what_its_run_recorded_counts(run, place):
    """For the run itself and for one of its checkpoints; the first of several templates is the chat's."""
    adapter = find(run / place)
    assert adapter.version == adapter.record == "someone/base@" + "a" * 40
    assert adapter.base.startswith("someone/base")
    assert (adapter.bits, adapter.template) == (4, "alpaca")
    assert adapter.fingerprints == {"base model": "b" * 64}


def test_a_damaged_checkpoint_that_was_named_is_refused(run):
    (run / "checkpoint-4" / "optimizer.safetensors").write_text("")
    with pytest.raises(UserError, match=r"optimizer\.safetensors"):
        find(run / "checkpoint-4")


def test_a_folder_beside_a_run_has_nothing_of_it(run):
    """Only a checkpoint or the folder `model` belongs to the run above it."""
    adapter = find(write(run / "notes"))
    assert (adapter.base, adapter.bits, adapter.template) == ("someone/base", None, None)


@pytest.fixture
def export(tmp_path) -> Path:
    """A folder as the export writes it."""
    folder = tmp_path / "export"
    folder.mkdir()
    values = {"base": "base.gguf", "adapter": "adapter.gguf", "template": "alpaca"}
    (folder / "export.json").write_text(json.dumps(values))
    for name in ("base.gguf", "adapter.gguf", "other.gguf"):
        (folder / name).write_text("")
    return folder


def test_an_exported_adapter(export):
    """By its folder or by its file; another file in the folder has no record there."""
    for path in (export, export / "adapter.gguf"):
        adapter = find(path)
        assert adapter.folder == export / "adapter.gguf"
        assert (adapter.base, adapter.template) == (str(export / "base.gguf"), "alpaca")
        assert (adapter.whole, adapter.is_gguf) == (False, True)
    other = find(export / "other.gguf")
    assert (other.folder, other.base, other.template) == (export / "other.gguf", None, None)


def test_an_exported_model_without_an_adapter(export):
    (export / "export.json").write_text(json.dumps({"base": "base.gguf", "adapter": None}))
    adapter = find(export)
    assert (adapter.whole, adapter.folder) == (True, export / "base.gguf")
    (export / "export.json").write_text(json.dumps({"base": None, "adapter": "adapter.gguf"}))
    assert find(export).base is None


@pytest.mark.parametrize("key", ["base", "adapter"])
@pytest.mark.parametrize("name", ["../x.gguf", "/x.gguf", "a/b.gguf", 3, ["base.gguf"]])
def test_an_export_that_names_files_elsewhere_is_damaged(export, key, name):
    values = {"base": "base.gguf", "adapter": "adapter.gguf", key: name}
    (export / "export.json").write_text(json.dumps(values))
    for path in (export, export / "adapter.gguf"):
        with pytest.raises(UserError, match=r"export\.json: damaged"):
            find(path)


@pytest.mark.parametrize("text", ["[]", "3", "{", ""])
def test_settings_that_are_no_object_are_damaged(tmp_path, text):
    folder = write(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError) as caught:
        find(folder)
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/one", "one"),
        ("runs/one/", "one"),
        ("runs/one/checkpoint-4", "one-checkpoint-4"),
        ("checkpoint-4", "checkpoint-4"),
        ("someone/adapter@" + "a" * 40, "adapter"),
        ("a b/ü (1)", "ü-1-"),
        ("x.gguf", "x.gguf"),
        ("", "adapter"),
    ],
)
def test_short_names(path, name):
    assert runs_adapters.short_name(path) == name


def test_an_older_adapter_is_rewritten(tmp_path):
    """Without a recorded alpha it is twice the rank, which is said; the user's folder stays as it is."""
    old, keep = tmp_path / "old", tmp_path / "keep"
    old.mkdir()
    keep.mkdir()
    names = [
        f"model.layers.0.self_attn.{name}.lora_{x}.weight" for name in ("q_proj", "v_proj") for x in "AB"
    ]
    tensors = {name: torch.ones((3, 8) if "_A" in name else (8, 3)) for name in names}
    save_file(tensors, old / "adapter_model.safetensors")
    adapter = runs_adapters.find(str(old), "one", "best", keep)
    assert adapter.origin == old
    assert adapter.folder.parent == keep
    assert [path.name for path in old.iterdir()] == ["adapter_model.safetensors"]
    assert any("does not record its alpha: 6 is used, twice its rank" in note for note in adapter.notes)
    config = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 6, False)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert set(load_file(adapter.folder / "adapter_model.safetensors")) == {
        f"base_model.model.{name}" for name in names
    }


@pytest.mark.parametrize(
    ("stored", "template"), [("alpaca, chatml", "alpaca"), (["alpaca"], None), (7, None), ("", None)], ids=str
)
def test_a_recorded_template_that_is_no_text_is_passed_over(tmp_path, stored, template):
    """Of several names the first counts, and a damaged record does not stop a chat."""
    folder = write(tmp_path / "adapter")
    (folder / "finetune_config.json").write_text(json.dumps({"options": {"template": stored}}))
    assert find(folder).template == template
