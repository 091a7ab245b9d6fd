"""No checkpoint is incomplete after a kill, a power failure, damage to its files or a full disk."""

import itertools
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from onecard.errors import UserError
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.system import whole_folder
from tests.support import promises
from tests.support.power_failure import optimizer, power_failures, save
from tests.support.promises import check_old_or_new, in_child, killed_at_operation, until_untouched
from tests.support.system_calls import traced


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run folder with checkpoints 5 and 10."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 5)
    save(folder, 10)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, keep):
    """C1, C13, C19: the old or the new one is there, never neither or a mixture; the next save cleans up."""
    promises.a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, keep)


def test_a_kill_while_a_checkpoint_is_replaced_leaves_one_of_the_two(tmp_path):
    """C1: the same step with another state (another budget) replaces the existing checkpoint."""

    def before(folder: Path) -> None:
        save(folder, 1)
        save(folder, 2, budget=100)

    killed, attempt = 0, killed_at_operation(lambda folder: save(folder, 2, budget=50))
    for folder, code in until_untouched(tmp_path, before, attempt):
        before_it = sorted(folder.iterdir())
        checkpoint, _ = runs_checkpoint.newest(folder)
        assert runs_checkpoint.read_progress(checkpoint).step == 2
        assert sorted(folder.iterdir()) == before_it, "to look is not to rename"
        runs_checkpoint.finish_rename(folder)
        newest, problems = runs_checkpoint.newest(folder)
        assert (newest and newest.name, problems) == ("checkpoint-2", [])
        assert runs_checkpoint.read_progress(newest).micro_batch_tokens in (50, 100)
        if code:
            killed += 1
            runs_folder.go_back(folder, 2)
            save(folder, 2, budget=25)
            assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert runs_checkpoint.read_progress(newest).micro_batch_tokens == 50
    assert killed >= 14


SYSTEM_CALLS = ["mkdir", "openat", "ftruncate", "write", "renameat", "fsync", "rename", "unlinkat", "rmdir"]


@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace (Debian package strace)")
@pytest.mark.parametrize("call", SYSTEM_CALLS)
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(tmp_path, call):
    """C2: as C1, but seen from outside of Python and so with the system calls of safetensors' own code."""

    def before(folder: Path) -> None:
        save(folder, 1)
        save(folder, 2)

    def attempt(folder: Path, number: int) -> int:
        return traced(lambda: save(folder, 3, keep=1), f"{call}:signal=SIGKILL:when={number}")

    killed = 0
    for folder, code in until_untouched(tmp_path, before, attempt):
        name = check_old_or_new(folder)
        killed += code != 0
    assert name == "checkpoint-3"
    assert killed >= 1


@pytest.mark.parametrize("fsync_works", [True, False])
def test_a_power_failure_leaves_a_whole_checkpoint(tmp_path, monkeypatch, fsync_works):
    """C3: in each legal state after it, every save that returned is there; without fsync some are lost."""
    with monkeypatch.context() as patch:
        good, total = power_failures(tmp_path, patch, fsync_works)
    assert total > 100
    assert (good == total) == fsync_works


def test_every_flipped_bit_is_found(copy):
    """C8: at 300 random places over all files; then the previous checkpoint is used."""
    promises.every_flipped_bit_is_found(copy)


def test_cut_missing_extra_and_mixed_files(copy):
    """C9, C10, C11: they are found, except extra files, which are named and not read."""
    promises.cut_missing_and_mixed_files_are_found(copy)
    last = copy / "checkpoint-10"
    (last / "notes.txt").write_text("mine")
    assert runs_checkpoint.verify(last) == ["notes.txt"]


def test_the_number_in_the_manifest_counts(copy):
    """T21, C11: neither the folder's name nor its time decides which checkpoint is newest."""
    os.utime(copy / "checkpoint-5", (2e9, 2e9))
    assert runs_checkpoint.newest(copy)[0].name == "checkpoint-10"
    (copy / "checkpoint-5").rename(copy / "checkpoint-99")
    newest, problems = runs_checkpoint.newest(copy)
    assert newest.name == "checkpoint-10"
    assert "say it is step 5" in problems[0]


def test_another_format_is_refused(copy):
    """C16: a later format is refused and not guessed."""
    path = copy / "checkpoint-10" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="format 2") as caught:
        runs_checkpoint.verify(path.parent)
    assert caught.value.code == 4


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("best", range(5))
def test_the_best_and_the_newest_checkpoint_are_never_deleted(tmp_path, keep, best):
    """C13: of steps 1 to 4 the last `keep` stay, and the best one; best: 0 while there is none."""
    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    runs_checkpoint.prune(tmp_path, keep, best)
    expected = {*range(5 - keep, 5), best} - {0}
    assert set(runs_folder.checkpoint_steps(tmp_path)) == expected


def test_a_disk_that_keeps_other_bytes_is_a_failing_save(tmp_path, monkeypatch):
    """C6: what was renamed is read again before the save returns, whichever file differs: exit code 4."""
    save(tmp_path, 1)
    put = whole_folder.put
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json"):

        def damage(folder: Path, target: Path, *rest, name: str = name) -> None:
            put(folder, target, *rest)
            content = bytearray((target / name).read_bytes())
            content[len(content) // 2] ^= 1
            (target / name).write_bytes(content)

        monkeypatch.setattr(whole_folder, "put", damage)
        with pytest.raises(UserError, match="checkpoint-2") as caught:
            save(tmp_path, 2)
        assert caught.value.code == 4
        assert runs_checkpoint.newest(tmp_path)[0].name == "checkpoint-1"
        shutil.rmtree(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("call", range(1, 11))
def test_a_failing_sync_is_a_failing_save(tmp_path, monkeypatch, call):
    """C5: an error of fsync gives exit code 7.

    Before the rename nothing is promoted, and nothing temporary stays.
    """
    save(tmp_path, 1)
    plain, calls = os.fsync, itertools.count(1)

    def fsync(handle: int) -> None:
        if next(calls) == call:
            raise OSError(5, "Input/output error")
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="Input/output error") as caught:
        save(tmp_path, 2)
    monkeypatch.undo()
    assert caught.value.code == 7
    assert not list(tmp_path.glob(".saving*"))
    assert runs_checkpoint.newest(tmp_path)[0].name == ("checkpoint-1" if call < 10 else "checkpoint-2")


def test_a_quota_is_a_failing_save(tmp_path):
    """C6: when any file cannot grow beyond a limit, it never says "saved", and nothing temporary stays."""
    save(tmp_path, 1)
    largest = max(path.stat().st_size for path in (tmp_path / "checkpoint-1").iterdir())
    for limit in range(0, largest, 16):

        def work(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            refused_with(7, lambda: save(tmp_path, 2))

        assert in_child(work) == 0, limit
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert save(tmp_path, 2).is_dir()


def test_a_folder_without_the_right_to_write_is_a_failing_save(tmp_path, monkeypatch):
    """C6: the exit code is 7. Root may write everywhere, so the test becomes an ordinary user."""
    save(tmp_path, 1)
    tmp_path.chmod(0o555)
    monkeypatch.chdir(tmp_path)  # an ordinary user may not enter the folders above

    def work() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        refused_with(7, lambda: save(Path(), 2))

    assert in_child(work) == 0
    tmp_path.chmod(0o755)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def refused_with(code: int, work) -> None:
    with pytest.raises(UserError) as caught:
        work()
    assert caught.value.code == code


def test_saving_needs_no_memory_for_the_base(tmp_path):
    """C21: a base model of 130 MB is not gathered, and neither adapter nor moments are copied."""
    promises.saving_needs_no_memory_for_the_base(tmp_path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    """C18: exit code 7 with the sizes in MiB, for a later save too."""
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match=r"needs about 1 MiB, free: 0 MiB") as caught:
        save(tmp_path, 2)
    assert caught.value.code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_leftovers_go_but_not_what_a_link_points_to(tmp_path):
    """C19: our own temporary folders are deleted; a link is removed, and its target does not change."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    run = tmp_path / "run"
    (run / ".saving-3-77").mkdir(parents=True)
    (run / ".saving-3-78").symlink_to(outside)
    (run / ".saving-notes").mkdir()
    runs_folder.go_back(run, 0)
    assert [path.name for path in run.iterdir()] == [".saving-notes"]
    assert (outside / "file").read_text() == "mine"


def test_temporary_files_lie_beside_their_place(tmp_path, monkeypatch):
    """C7: it does not matter that the system's temporary folder is on another file system."""
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert save(tmp_path, 1).is_dir()


def test_odd_names(tmp_path, monkeypatch):
    """C17: names with blanks or Unicode, long names, a linked folder and a relative path all work."""
    for name in ("with blank", "ünï-文件", "x" * 250):
        folder = tmp_path / name
        folder.mkdir()
        assert runs_checkpoint.newest(save(folder, 1).parent)[0].name == "checkpoint-1"
    (tmp_path / "link").symlink_to(tmp_path / "with blank")
    assert save(tmp_path / "link", 2).is_dir()
    monkeypatch.chdir(tmp_path)
    assert runs_checkpoint.newest(Path("with blank"))[0].name == "checkpoint-2"


def test_saving_over_a_loaded_file_changes_nothing(tmp_path):
    """C14: tensors that were read from a checkpoint do not change when it is replaced or deleted."""
    tensors = load_file(save(tmp_path, 1) / "optimizer.safetensors")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    save(tmp_path, 1, budget=7)
    assert runs_checkpoint.read_progress(tmp_path / "checkpoint-1").micro_batch_tokens == 7
    save(tmp_path, 2, keep=1)
    assert not (tmp_path / "checkpoint-1").exists()
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_optimizer_comes_back(tmp_path):
    """The restored optimizer makes the same update, bit for bit."""
    one, path = optimizer(3), save(tmp_path, 3)
    other = torch.optim.AdamW([torch.nn.Parameter(one.param_groups[0]["params"][0].detach().clone())], lr=0.1)
    runs_checkpoint.restore(path, other, torch.amp.GradScaler("cpu", enabled=False))
    for adamw in (one, other):
        parameter = adamw.param_groups[0]["params"][0]
        parameter.grad = torch.full_like(parameter, 0.25)
        adamw.step()
    assert torch.equal(*(adamw.param_groups[0]["params"][0] for adamw in (one, other)))


def test_a_lock_dies_with_its_owner(tmp_path):
    """T22: refused with the pid while the owner lives, free after a kill; at the end the file is deleted."""
    promises.a_lock_dies_with_its_owner(tmp_path)
