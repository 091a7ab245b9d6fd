"""A folder that system/whole_folder.py makes is complete or missing, after any kill or race."""

import os
import signal
import threading
from pathlib import Path

import pytest

from onecard.system import files as system_files
from onecard.system import whole_folder
from tests.support import faults
from tests.support.paths import ROOT

FILES = {"a.json": b"{}", "inner/b.bin": bytes(64), "manifest.json": b"[]"}
MOST = 60  # `make` needs at most so many file operations


def make(target: Path) -> None:
    with whole_folder.stage(target) as (place, _):
        (place / "inner").mkdir()
        (place / "a.json").write_bytes(FILES["a.json"])
        (place / "inner/b.bin").write_bytes(FILES["inner/b.bin"])
        manifest = place / "manifest.json"
        whole_folder.put(place, target, lambda: system_files.replace(manifest, FILES["manifest.json"]))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_kill_at_any_file_operation(tmp_path):
    """The next process completes the folder, and nothing is left beside it."""
    for number in range(1, MOST):
        target = tmp_path / "made"
        child = os.fork()
        if not child:
            try:
                faults.kill_at_operation(number)
                make(target)
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL)
        if target.exists():
            assert contents(target) == FILES
        else:
            make(target)
        assert [path.name for path in tmp_path.iterdir() if path != target] in ([], [".made.making"])
        for path in tmp_path.iterdir():
            whole_folder._empty(path)
            path.rmdir()
        if code == 0:
            break
    assert 10 < number < MOST - 1


def test_the_manifest_is_written_when_all_else_is_on_the_disk(tmp_path, monkeypatch):
    """The rename comes after the manifest, and the parent folder is synced last."""
    log: list[str] = []
    for name in ("sync_file", "sync_folder"):
        plain = getattr(system_files, name)
        synced = lambda path, plain=plain: (log.append(path.name), plain(path))  # noqa: E731
        monkeypatch.setattr(system_files, name, synced)
    rename = Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (log.append(f"rename to {to.name}"), rename(path, to))
    )
    (tmp_path / "stage" / "inner").mkdir(parents=True)
    (tmp_path / "stage" / "inner" / "b.bin").write_bytes(b"1")
    (tmp_path / "stage" / "a.json").write_bytes(b"2")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").touch()
    stage, old, replaced = (tmp_path / name for name in ("stage", "old", "replaced"))
    whole_folder.put(stage, old, lambda: log.append("manifest"), replaced)
    assert sorted(log[:3]) == ["a.json", "b.bin", "inner"]
    assert log[3:] == ["manifest", "stage", "rename to replaced", "rename to old", tmp_path.name]
    assert (replaced / "file").exists()
    assert contents(old) == {"inner/b.bin": b"1", "a.json": b"2"}


def test_a_folder_that_is_there_is_not_written_over(tmp_path):
    make(tmp_path / "made")
    (tmp_path / "made" / "mine").touch()
    with pytest.raises(OSError, match="not empty"):
        make(tmp_path / "made")
    assert (tmp_path / "made" / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_one_process_at_a_time(tmp_path):
    """A second process waits for the rename of the first, and then starts with an empty folder of its own."""
    target, waiting, seen = tmp_path / "made", threading.Event(), []

    def wait() -> None:
        with whole_folder.stage(target, before_waiting=waiting.set) as (place, _):
            seen.append((target.is_dir(), list(place.iterdir())))

    with whole_folder.stage(target) as (place, _):
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(10)
        with pytest.raises(TimeoutError), whole_folder.stage(target, patience=0):
            pass
        (place / "file").touch()
        whole_folder.put(place, target)
    thread.join(10)
    assert seen == [(True, [])]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_nobody_else_renames_folders():
    """Only a run's checkpoints do: one whose rename was killed, and those that are set aside."""
    files = [
        path for path in (ROOT / "onecard").rglob("*.py") if ".rename(" in path.read_text(encoding="utf-8")
    ]
    names = sorted(path.relative_to(ROOT / "onecard").as_posix() for path in files)
    assert names == ["runs/checkpoint.py", "runs/folder.py", "system/whole_folder.py"]


def test_a_link_in_the_place_of_the_stage_is_not_followed(tmp_path):
    """It may have come with an adapter, so the files it points to must stay."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").touch()
    (tmp_path / ".made.making").symlink_to(tmp_path / "home")
    with pytest.raises(NotADirectoryError, match="is a link"):
        make(tmp_path / "made")
    assert (tmp_path / "home" / "letter.txt").exists()
    assert not (tmp_path / "made").exists()
