"""The checks that nothing is lost can fail: each mutant breaks one promise, and its check notices.

The checks are those of tests/support/promises.py, which other tests run on the unbroken code. Mutants of a
resume are in test_resume.py (faults.MUTANTS), and mutants of syncing in test_checkpoint.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import legacy
from onecard.system import files as system_files
from onecard.system import lock
from tests.support import faults, promises, tiny
from tests.support.power_failure import save
from tests.support.resume_cases import straight_runs

FAILURE = (AssertionError, pytest.fail.Exception)


def noticed(promise: Callable, *arguments, **fault) -> None:
    """Assert that the check fails, which runs with a mutant in place."""
    with pytest.raises(FAILURE):
        promise(*arguments, **fault)


@pytest.fixture
def run(tmp_path) -> Path:
    return tmp_path / "run"


def save_both(run: Path) -> Path:
    """A run folder with checkpoints 5 and 10."""
    run.mkdir()
    for step in (5, 10):
        save(run, step)
    return run


def test_without_hashes_flipped_bits_are_noticed(run, monkeypatch):
    monkeypatch.setattr(runs_checkpoint, "sha256", lambda _: "")
    noticed(promises.every_flipped_bit_is_found, save_both(run))


def test_without_a_manifest_cut_and_mixed_files_are_noticed(run, monkeypatch):
    save_both(run)
    monkeypatch.setattr(runs_checkpoint, "verify", lambda _: [])
    noticed(promises.cut_missing_and_mixed_files_are_found, run)


def test_a_save_in_place_is_noticed(tmp_path, monkeypatch):
    """The mutant writes the manifest first and then the files, directly in their final place."""

    def save(folder: Path, progress, save_adapter, *_) -> Path:
        target = folder / f"checkpoint-{progress.step}"
        target.mkdir()
        system_files.write_json(target / runs_checkpoint.MANIFEST, {})
        save_adapter(target)
        return target

    monkeypatch.setattr(runs_checkpoint, "save", save)
    noticed(promises.a_kill_at_any_file_operation_leaves_a_whole_checkpoint, tmp_path, 1)


def test_deleting_the_newest_is_noticed(tmp_path, monkeypatch):
    def prune(folder: Path, keep: int | None, best_step: int) -> None:
        if keep:
            for step in sorted(runs_folder.checkpoint_steps(folder))[keep:]:
                shutil.rmtree(folder / f"checkpoint-{step}")

    monkeypatch.setattr(runs_checkpoint, "prune", prune)
    noticed(promises.a_kill_at_any_file_operation_leaves_a_whole_checkpoint, tmp_path, 1)


def test_a_lock_that_locks_nothing_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "take", lambda *_: True)
    noticed(promises.a_lock_dies_with_its_owner, tmp_path)


def test_gathering_the_base_is_noticed(tmp_path):
    def gather(adapted) -> list[torch.Tensor]:
        return [tensor.clone() for tensor in adapted.state_dict().values()]

    noticed(promises.saving_needs_no_memory_for_the_base, tmp_path, gather)


def test_a_torn_update_is_noticed(harness, tiny_model, tmp_path):
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    whole = straight_runs(harness, tiny_model, rows, tmp_path / "straight")("16 bits")
    promise = promises.a_signal_within_an_update_waits_for_its_end
    noticed(promise, harness, whole, tiny_model, rows, tmp_path, torn_updates=True)


def test_a_partial_gradient_is_noticed(harness, tiny_model, tmp_path):
    fault = {"no_memory_at": [2], "partial_gradients": True}
    (tmp_path / "whole").mkdir()
    untroubled = promises.untroubled_run(harness, tiny_model, tmp_path / "whole")
    with pytest.raises(AssertionError, match="comparison failed"):
        promises.the_step_is_redone_with_the_same_gradient(harness, untroubled, tmp_path, fault)


def test_an_unpickler_that_knows_everything_is_noticed(tmp_path, monkeypatch):
    """The canary of the hostile files appears when an unpickler runs their code."""
    canary = tmp_path / "canary"
    torch.save({"state": faults.Touch(canary)}, tmp_path / "hostile.pt")
    plain = torch.load

    def read() -> None:  # this limits its own process, so it runs in a child
        legacy._child(f"{tmp_path}/hostile.pt", f"{tmp_path}/out")

    promises.in_child(read)
    assert not canary.exists()
    monkeypatch.setattr(torch, "load", lambda path, **_: plain(path, weights_only=False))
    promises.in_child(read)
    assert canary.exists()
