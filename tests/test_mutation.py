"""The tests of what must not be lost can fail: each mutant breaks one promise, and its test sees it.

Mutants of what a resume restores: test_resume.py (faults.MUTANTS); of syncing: test_checkpoint.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onecard import checkpoint, legacy, lock, runfolder
from tests.runs import test_checkpoint
from tests.runs.test_checkpoint import copy, saved  # noqa: F401 (fixtures)
from tests.support import faults
from tests.training import test_out_of_memory, test_resume
from tests.training.test_out_of_memory import untroubled  # noqa: F401
from tests.training.test_resume import rows, straight  # noqa: F401

FAILURE = (AssertionError, pytest.fail.Exception)


def noticed(test: Callable, *arguments) -> None:
    """The test fails when it is called with a mutant in place."""
    with pytest.raises(FAILURE):
        test(*arguments)


def test_without_hashes_flipped_bits_are_noticed(copy, monkeypatch):  # noqa: F811
    for path in sorted(copy.glob("checkpoint-*")):  # as a save without hashes would have left them
        shutil.rmtree(path)
    monkeypatch.setattr(checkpoint, "sha256", lambda _: "")
    for step in (5, 10):
        test_checkpoint.save(copy, step)
    noticed(test_checkpoint.test_every_flipped_bit_is_found, copy)


def test_without_a_manifest_cut_and_mixed_files_are_noticed(copy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(checkpoint, "verify", lambda _: [])
    noticed(test_checkpoint.test_cut_missing_extra_and_mixed_files, copy)


def test_a_save_in_place_is_noticed(tmp_path, monkeypatch):
    """The manifest comes first, then the files, right where they belong."""

    def save(folder: Path, progress, save_adapter, *_) -> Path:
        target = folder / f"checkpoint-{progress.step}"
        target.mkdir()
        runfolder.write_json(target / checkpoint.MANIFEST, {})
        save_adapter(target)
        return target

    monkeypatch.setattr(checkpoint, "save", save)
    noticed(test_checkpoint.test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint, tmp_path, 1)


def test_deleting_the_newest_is_noticed(tmp_path, monkeypatch):
    def prune(folder: Path, keep: int | None, best_step: int) -> None:
        if keep:
            for step in sorted(runfolder.checkpoint_steps(folder))[keep:]:
                shutil.rmtree(folder / f"checkpoint-{step}")

    monkeypatch.setattr(checkpoint, "prune", prune)
    noticed(test_checkpoint.test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint, tmp_path, 1)


def test_a_lock_that_locks_nothing_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_take", lambda *_: None)
    noticed(test_checkpoint.test_a_lock_dies_with_its_owner, tmp_path)


def test_gathering_the_base_is_noticed(tmp_path):
    def gather(adapted) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in adapted.state_dict().values()]

    noticed(test_checkpoint.test_saving_needs_no_memory_for_the_base, tmp_path, gather)


def test_a_torn_update_is_noticed(harness, straight, tiny_model, rows, tmp_path):  # noqa: F811
    fault = {"torn_updates": True}
    test = test_resume.test_a_signal_within_an_update_waits_for_its_end
    noticed(test, harness, straight, tiny_model, rows, tmp_path, fault)


def test_a_partial_gradient_is_noticed(harness, untroubled, tmp_path):  # noqa: F811
    fault = {"no_memory_at": [2], "partial_gradients": True}
    test = test_out_of_memory.test_the_step_is_redone_with_the_same_gradient
    with pytest.raises(AssertionError, match="comparison failed"):
        test(harness, untroubled, tmp_path, fault)


def test_an_unpickler_that_knows_everything_is_noticed(tmp_path, monkeypatch):
    """The canary of the hostile files is one that sings."""
    canary = tmp_path / "canary"
    torch.save({"state": faults.Touch(canary)}, tmp_path / "hostile.pt")
    plain = torch.load

    def read() -> None:  # it limits its own process, so in a child
        legacy._child(f"{tmp_path}/hostile.pt", f"{tmp_path}/out")

    test_checkpoint.in_child(read)
    assert not canary.exists()
    monkeypatch.setattr(torch, "load", lambda path, **_: plain(path, weights_only=False))
    test_checkpoint.in_child(read)
    assert canary.exists()
