"""What a checkpoint holds, which checkpoints are kept, and what is published."""

import dataclasses
import errno
import json
import os
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onecard.errors import DISK, UserError
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs.checkpoint import Progress
from onecard.system.hashing import sha256
from tests.support.power_failure import Disk, optimizer, save, save_adapter


def test_progress_comes_back(tmp_path):
    """All of it but what the log knows better: the last evaluation and the best one."""
    progress = Progress(7, 6, 42, 900, 1.5, 1, 0, ["yes", "no"], 512, evaluated=6, best_step=6, best_loss=0.5)
    path = runs_checkpoint.save(
        tmp_path,
        progress,
        lambda place: save_adapter(place, torch.ones(4)),
        optimizer(7),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    expected = dataclasses.replace(progress, evaluated=-1, best_step=0, best_loss=None)
    assert runs_checkpoint.read_progress(path) == expected == runs_checkpoint.verified_progress(path)


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (None, 0, [2, 4, 6, 8]),
        (1, 0, [8]),
        (2, 0, [6, 8]),
        (3, 0, [4, 6, 8]),
        (4, 0, [2, 4, 6, 8]),
        (9, 0, [2, 4, 6, 8]),
        (1, 2, [2, 8]),
        (1, 8, [8]),
        (2, 4, [4, 6, 8]),
        (3, 8, [4, 6, 8]),
    ],
)
def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, keep, best, left):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    runs_checkpoint.prune(tmp_path, keep, best)
    assert sorted(runs_folder.checkpoint_steps(tmp_path)) == left


def test_the_room_that_a_save_needs(tmp_path, monkeypatch):
    """It is that of the adapter, of its two moments and step, and of small files."""
    sizes = []
    monkeypatch.setattr(runs_checkpoint, "check_room", lambda folder, size: sizes.append((folder, size)))
    save(tmp_path, 1)
    weights = 3 * 5 * 4  # bytes
    assert sizes == [(tmp_path, weights + 2 * weights + 4 + (1 << 20))]


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_loss_scale_comes_back(tmp_path, is_enabled):
    """A scaler that is off has no state, and neither is one given to a scaler that is off now."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=is_enabled)
    scaler.scale(torch.ones(1))  # so that it has its state
    path = runs_checkpoint.save(
        tmp_path, Progress(step=1), lambda place: save_adapter(place, torch.ones(4)), optimizer(1), scaler
    )
    for other_is_enabled, scale in ((True, 64.0 if is_enabled else 1024.0), (False, 1.0)):
        other = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=other_is_enabled)
        runs_checkpoint.restore(path, optimizer(2), other)
        assert other.get_scale() == scale


@pytest.mark.parametrize("changes", [{"updates": 1}, {"rows_seen": 1}, {"micro_batch_tokens": 9}])
def test_a_step_with_another_state_is_saved_again(tmp_path, changes):
    """The rows were started anew, or the budget has changed. The same state is left as it is."""

    def saved_again(progress: Progress) -> bool:
        calls = []
        runs_checkpoint.save(
            tmp_path,
            progress,
            lambda place: calls.append(save_adapter(place, torch.ones(4))),
            optimizer(1),
            torch.amp.GradScaler("cpu", enabled=False),
        )
        return bool(calls)

    large = 2000  # Python keeps one object for each small number
    progress = Progress(step=1, updates=large, rows_seen=large, micro_batch_tokens=large)
    assert saved_again(progress)
    assert not saved_again(dataclasses.replace(progress, tokens=5, seconds=3.0))
    assert saved_again(dataclasses.replace(progress, **changes))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_adapter_is_published_beside_the_log(tmp_path):
    path = save(tmp_path, 3)
    digest = runs_checkpoint.publish(path, tmp_path)
    assert digest == sha256(path / "adapter_model.safetensors")
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert sorted(file.name for file in tmp_path.iterdir()) == [*names, "checkpoint-3"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (path / name).read_bytes()


def test_a_model_is_published_in_a_folder_of_its_own(tmp_path, monkeypatch):
    """What only a training needs is not in it, and a model that is there already is replaced."""
    sizes = []

    def save_model(place: Path) -> None:
        save_file({"a": torch.ones(4)}, place / "model.safetensors")
        (place / "config.json").write_text("{}")
        (place / "tokenizer.json").write_text("{}")

    off = torch.amp.GradScaler("cpu", enabled=False)
    path = runs_checkpoint.save(tmp_path, Progress(step=3), save_model, optimizer(3), off)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    monkeypatch.setattr(runs_checkpoint, "check_room", lambda folder, size: sizes.append((folder, size)))
    digest = runs_checkpoint.publish(path, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint-3", "model"]
    expected = ["config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == expected
    assert digest == sha256(tmp_path / "model" / "model.safetensors")
    assert sizes == [(tmp_path, (path / "model.safetensors").stat().st_size)]  # room for it was looked for


def test_an_optimizer_state_of_any_depth_comes_back():
    """Such as that of DeepSpeed, whose entries are in groups."""
    restored = {}
    saved = types.SimpleNamespace(
        state_dict=lambda: {"param_groups": ["group"]}, load_state_dict=restored.update
    )
    flat = {"0.step": 3, "0.moments.first": 4, "0.moments.scales.low": 5, "12.moments.first": 6}
    runs_checkpoint.restore_optimizer(saved, flat)
    states = {0: {"step": 3, "moments": {"first": 4, "scales": {"low": 5}}}, 12: {"moments": {"first": 6}}}
    assert restored == {"state": states, "param_groups": ["group"]}


@pytest.mark.parametrize("is_link", [False, True])
def test_what_a_killed_process_with_the_same_number_left_is_in_no_way(tmp_path, is_link):
    left = tmp_path / f".saving-3-{os.getpid()}"
    if is_link:
        left.symlink_to(tmp_path / "nowhere")
    else:
        left.mkdir()
        (left / "half").write_text("a")
    path = save(tmp_path, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]
    assert not (path / "half").exists()


def test_a_new_run_has_counted_nothing():
    progress = dataclasses.asdict(Progress())
    assert {name: value for name, value in progress.items() if value and name != "evaluated"} == {}


def whole_model(folder: Path, step: int) -> Path:
    """A checkpoint of a run that trains all weights."""

    def save_model(place: Path) -> None:
        save_file({"a": torch.full((4,), float(step))}, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps({"step": step}))

    off = torch.amp.GradScaler("cpu", enabled=False)
    return runs_checkpoint.save(folder, Progress(step=step), save_model, optimizer(step), off)


def test_a_power_failure_leaves_the_older_model_or_the_newer_one(tmp_path, monkeypatch):
    """A run that was made longer publishes its model a second time; the program that goes on names it."""
    run, paths = tmp_path / "run", {}
    run.mkdir()
    for step in (1, 2):
        paths[step] = whole_model(run, step)
    runs_checkpoint.publish(paths[1], run)
    before, models = Disk.tree(run), []
    with monkeypatch.context() as patch:
        disk = Disk(run, patch)
        runs_checkpoint.publish(paths[2], run)
        disk.notice()
    names = ("model.safetensors", "config.json")
    whole = [[(path / name).read_bytes() for name in names] for path in paths.values()]
    for _, state in disk.states(before, most=2):
        folders = [run / "model", run / ".replaced-model"]
        models = [[state.get(folder / name) for name in names] for folder in folders if folder in state]
        assert models
        assert models[0] in whole
    assert models[0] == whole[1]
    (run / "model").rename(run / ".replaced-model")
    runs_checkpoint.finish_rename(run)
    assert (run / "model" / "config.json").is_file()
    shutil.copytree(run / "model", run / ".replaced-model")
    assert runs_folder.leftovers(run) == [run / ".replaced-model"]


def test_a_full_disk_while_an_adapter_is_published(tmp_path, monkeypatch):
    """It is exit code 7 with the name of the file, and no half of a file stays."""
    path = save(tmp_path, 3)

    def copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs_checkpoint.shutil, "copyfile", copy)
    with pytest.raises(UserError, match="adapter_config") as refused:
        runs_checkpoint.publish(path, tmp_path)
    assert refused.value.code == DISK
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_full_disk_while_a_model_is_published(tmp_path, monkeypatch):
    """The model that was published before stays."""
    run = tmp_path / "run"
    run.mkdir()
    runs_checkpoint.publish(whole_model(run, 1), run)
    path, before = whole_model(run, 2), (run / "model" / "model.safetensors").read_bytes()

    def copy(source: Path, target: Path, ignore: object) -> None:
        target.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs_checkpoint.shutil, "copytree", copy)
    with pytest.raises(UserError, match="model") as refused:
        runs_checkpoint.publish(path, run)
    assert refused.value.code == DISK
    assert (run / "model" / "model.safetensors").read_bytes() == before
    assert sorted(file.name for file in run.iterdir()) == ["checkpoint-1", "checkpoint-2", "model"]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_not_published(tmp_path, name):
    path = save(tmp_path, 3)
    (path / name).write_bytes(b"x" + (path / name).read_bytes()[1:])
    with pytest.raises(UserError, match=name):
        runs_checkpoint.publish(path, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]\n",
        "{}\n",
        '{"files": []}\n',
        '{"files": {"a": 3}}\n',
        '{"files": {"a": {}}}\n',
        "\xff\n",
        "nonsense\n",
    ],
)
def test_a_manifest_that_is_none_is_named(tmp_path, text):
    """Whatever it holds instead, the checkpoint before it is used."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "manifest.json").write_bytes(f"{text}\n".encode("latin-1"))
    path, problems = runs_checkpoint.newest(tmp_path)
    assert path == tmp_path / "checkpoint-5"
    assert len(problems) == 1
    assert str(tmp_path / "checkpoint-10" / "manifest.json") in problems[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"progress": 3}', '{"progress": {"step": 10}}', "\xff", '{"progress": []}']
)
def test_progress_that_is_none_is_named(tmp_path, text):
    save(tmp_path, 10)
    path = tmp_path / "checkpoint-10" / "progress.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"progress\.json: damaged") as caught:
        runs_checkpoint.read_progress(path.parent)
    assert caught.value.code == 4
    path.unlink()
    with pytest.raises(UserError, match=r"progress\.json: damaged"):
        runs_checkpoint.read_progress(path.parent)
