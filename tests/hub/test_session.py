"""In a session a name of the hub means one commit, reported once; a later session sees a moved branch."""

import contextvars
import threading
import types
from pathlib import Path

import pytest

from onecard.hub import client, model_files, revisions
from onecard.hub import session as hub_session

NAME, OLD, NEW = "someone/model", "a" * 40, "b" * 40


class Hub:
    """A hub whose branch moves; it records the requests, and its files are there at once."""

    def __init__(self, cache: Path):
        self.cache, self.branch, self.asked = cache, OLD, []

    def ask_commit(self, name: str, kind: str, revision: str) -> str:
        self.asked.append(name)
        return self.branch

    def bring(self, version: revisions.Version, patterns: tuple[str, ...]) -> Path:
        folder = self.cache / "models--someone--model" / "snapshots" / version.commit
        folder.mkdir(parents=True, exist_ok=True)
        if patterns == model_files.TENSORS:
            (folder / model_files.MODEL_WEIGHTS).touch()
        return folder


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    moving_hub = Hub(tmp_path / "hub")
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(moving_hub.cache))
    monkeypatch.setattr(client, "ask_commit", moving_hub.ask_commit)
    monkeypatch.setattr(revisions, "_bring", moving_hub.bring)
    return moving_hub


def fetch() -> str:
    return revisions.fetch(NAME, revisions.MODEL, model_files.SETTINGS).name


def test_two_sessions_of_one_process(hub, capsys):
    """A second command is told of the move, and within each command nothing is requested twice."""
    with hub_session.session():
        assert fetch() == OLD
        hub.branch = NEW
        assert fetch() == OLD
        with hub_session.session():  # a part of the same command
            assert fetch() == OLD
    assert hub.asked == [NAME]
    assert capsys.readouterr().out.count(f"{NAME} is commit {OLD}") == 1
    with hub_session.session():
        assert fetch() == fetch() == NEW
    assert hub.asked == [NAME, NAME]
    assert f"main has moved from {OLD[:12]} to {NEW[:12]}" in capsys.readouterr().out


def test_without_a_session_every_call_asks(hub):
    assert fetch() == OLD
    hub.branch = NEW
    assert fetch() == NEW
    assert hub_session.current() is not hub_session.current()


def test_requests_of_two_threads_do_not_meet(hub):
    """A thread does not have the session of another, except in a copy of its context."""
    commits: list[str] = []

    def request() -> None:
        with hub_session.session():
            commits.append(fetch())

    with hub_session.session():
        assert fetch() == OLD
        hub.branch = NEW
        context = contextvars.copy_context()
        for target in (request, lambda: context.run(request)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert commits == [NEW, OLD]


def test_weights_are_those_of_the_commit_that_the_session_means(hub):
    """Outside of the session the folder is like any other, and nothing is fetched into it."""
    with hub_session.session():
        folder = revisions.fetch(NAME, revisions.MODEL, model_files.SETTINGS)
        hub.branch = NEW
        revisions.complete(folder, model_files.TENSORS)
    assert (folder / model_files.MODEL_WEIGHTS).exists()
    (folder / model_files.MODEL_WEIGHTS).unlink()
    revisions.complete(folder, model_files.TENSORS)
    assert not (folder / model_files.MODEL_WEIGHTS).exists()


def test_a_move_is_looked_up_once_in_a_session(hub, capsys):
    with hub_session.session():
        for _ in range(2):
            revisions.tell_move(f"{NAME}@{NEW}")
    assert hub.asked == [NAME]
    assert capsys.readouterr().out.count("has moved") == 1
    with hub_session.session():
        revisions.tell_move(f"{NAME}@{NEW}")
    assert hub.asked == [NAME, NAME]


def test_the_training_window_asks_once(hub, tmp_path, monkeypatch):
    """Previews run in threads of the page, and a name keeps the meaning that it had at the first one."""
    training_form = pytest.importorskip("onecard.ui.training_form")  # brings gradio
    monkeypatch.setattr(training_form, "_encoder", lambda folder, template: (Path(folder).name, template))
    with hub_session.session():
        form = training_form.TrainingForm(types.SimpleNamespace(workspace=tmp_path, lang="en"))
    commits: list[str] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: commits.append(form._load_encoder(NAME, "alpaca")[0]))
        thread.start()
        thread.join()
        hub.branch = NEW
    assert commits == [OLD, OLD]
    assert hub.asked == [NAME]
