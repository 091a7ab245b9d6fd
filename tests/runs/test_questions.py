"""A question about a run, a folder or a name of the hub changes nothing and uses no network.

Each question is about a tree that nothing may write to, with a network that refuses. Afterwards the tree and
its times are as before, and nothing was printed.
"""

import json
import os
import socket
from pathlib import Path

import pytest

from onecard.hub import locate, manifest, remote_code, revisions
from onecard.models import base_model
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from onecard.runs import jobs, legacy
from onecard.runs import log as runs_log
from onecard.system import files as system_files
from onecard.system import lock, output_folder
from tests.support.power_failure import save

NAME, COMMIT = "someone/model", "a" * 40


def state(place: Path) -> dict[str, tuple[int, int, bytes]]:
    """The mode, time of change and content of every path, by its name."""
    return {
        str(path.relative_to(place)): (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(place.rglob("*"))
    }


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A run whose last save was killed, a snapshot without weights, a download, a folder of a tool."""
    run = tmp_path / "workspace" / "run"
    run.mkdir(parents=True)
    save(run, 1)
    save(run, 2).rename(run / f"{runs_checkpoint.REPLACED}2")
    options = {"options": {"train_what": "lora"}, "resolved": {"total_steps": 2}}
    (run / runs_folder.CONFIG).write_text(json.dumps(options))
    (run / runs_folder.LOG).write_text('{"step": 1, "loss": 1.0}\n{"step": 1, "eval_loss": 1.0}\n')
    (run / runs_folder.SAMPLES).write_text('{"step": 1, "answers": []}\n')
    (run / lock.NAME).write_text(str(os.getpid()))
    jobs.console_of(run).write_text("=== 2026-11-30 12:00:00 onecard finetune\n=== process 1\n")
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"auto_map": {"AutoModel": "model.Model"}}')
    (snapshot / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    download = manifest.place("other/model")
    download.mkdir(parents=True)
    values = {"source": "hub", "name": "other/model", "revision": "main", "commit": COMMIT, "endpoint": ""}
    manifest.write(download, {**values, "files": {}})
    return tmp_path


def questions(place: Path) -> list:
    run, snapshot = place / "workspace" / "run", revisions.at_hand(NAME)
    assert snapshot is None, "it has no weights"
    snapshot = place / "hub" / "models--someone--model" / "snapshots" / COMMIT
    asking_runs = [
        runs_folder.contents,
        runs_folder.trained_all,
        runs_folder.leftovers,
        runs_folder.has_log,
        runs_folder.aside,
        runs_log.evaluations,
        runs_log.last_sampled,
        runs_folder.checkpoint_steps,
        runs_checkpoint.newest,
        legacy.is_legacy,
        runs_log.last_step,
        runs_log.best_step,
        runs_log.samples,
        jobs.config_of,
        jobs.console_of,
        lock.check_free,
        lock.owner_of,
    ]
    return [
        *(lambda ask=ask: ask(run) for ask in asking_runs),
        lambda: runs_checkpoint.verify(run / "checkpoint-1"),
        lambda: lock.is_taken(run / lock.NAME),
        lambda: jobs.names(run.parent),
        lambda: jobs.state(run.parent, "run"),
        lambda: jobs.free_name(run.parent),
        lambda: jobs.training_on(run.parent, "cpu"),
        lambda: base_model.identity_files(str(snapshot)),
        lambda: remote_code.named(snapshot),
        lambda: revisions.of(snapshot),
        lambda: revisions.at_hand(f"{NAME}@{COMMIT}"),
        lambda: revisions.at_hand("other/model"),
        lambda: revisions.recorded(NAME, f"{NAME}@{COMMIT}"),
        lambda: revisions.parsed(f"{NAME}@{COMMIT}"),
        lambda: revisions.is_name(NAME),
        lambda: locate.here(NAME),
        lambda: locate.here("demo"),
        lambda: manifest.downloaded("other/model"),
        lambda: manifest.read(manifest.place("other/model")),
        lambda: output_folder.find(place / "new" / "folder", "--output_path"),
        lambda: output_folder.is_made(place / "new" / "folder", {}, "--output_path"),
        lambda: output_folder.record("test", {}, [snapshot / "config.json"]),
        lambda: system_files.cache_folder(),
        lambda: system_files.or_sample(Path("sample/instruct.json")),
    ]


def test_asking_does_nothing(place, monkeypatch, capfd):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in ("rename", "replace", "mkdir", "unlink", "rmdir", "fsync", "utime"):
        monkeypatch.setattr(os, name, lambda *_, name=name, **__: pytest.fail(f"os.{name} was called"))
    before, environment = state(place), dict(os.environ)
    for ask in questions(place):
        ask()
    assert state(place) == before
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")


def test_what_a_kill_left_undone_is_seen_and_finished_by_another_call(place):
    run = place / "workspace" / "run"
    path, problems = runs_checkpoint.newest(run)
    assert (path, problems) == (run / f"{runs_checkpoint.REPLACED}2", [])
    runs_checkpoint.finish_rename(run)
    assert runs_checkpoint.newest(run) == (run / "checkpoint-2", [])
    runs_checkpoint.finish_rename(run)
    assert not list(run.glob(f"{runs_checkpoint.REPLACED}*"))
