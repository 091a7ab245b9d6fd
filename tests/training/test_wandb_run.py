"""A run folder has one run at Weights & Biases, which goes on when the run does. The service is a fake."""

import importlib.machinery
import json
import sys
import types
from pathlib import Path

import pytest

from onecard.errors import UserError
from onecard.runs import folder as runs_folder
from onecard.training.metrics import MetricLogger


class Service(types.ModuleType):
    """What OneCard uses of the module wandb; the runs are kept by id, as the service keeps them."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.runs: dict[str, Run] = {}
        self.settings: list[dict] = []
        self.errors = types.SimpleNamespace(Error=RuntimeError)
        self.deleted: set[str] = set()

    def init(self, id: str, resume: str, **settings) -> "Run":
        assert resume == "allow"
        if id in self.deleted:
            raise RuntimeError(f"run {id} was previously created and deleted")
        self.settings.append(settings)
        return self.runs.setdefault(id, Run())


class Run:
    """A run at the service. Like the real one it ignores what comes with an older step of its own."""

    def __init__(self) -> None:
        self.history: list[dict] = []
        self.axes: dict[str, str | None] = {}
        self.step = 0

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, values: dict, step: int | None = None) -> None:
        if step is None or step >= self.step:
            self.step = self.step + 1 if step is None else step
            self.history.append(values)

    @property
    def summary(self) -> dict:
        return self.history[-1] if self.history else {}

    def finish(self) -> None:
        pass


@pytest.fixture
def service(monkeypatch) -> Service:
    fake = Service()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "offline")  # nobody need be logged in
    return fake


def log(folder: Path, steps: range, **settings) -> None:
    """Log these steps, in one start of the program."""
    metrics = MetricLogger(folder, 9, 54, 1, settings, loud=True)
    for step in steps:
        metrics.event({"step": step, "loss": 1.0 / step})
        metrics.event({"step": step, "eval_loss": 2.0 / step})
    metrics.close()


def test_a_run_that_goes_on_goes_on_at_the_service(service, tmp_path):
    """There is one W&B run with all steps; a changed option may replace its old value."""
    log(tmp_path, range(1, 4), save_steps=1)
    log(tmp_path, range(4, 7), save_steps=2)
    (run,) = service.runs.values()
    assert [values["step"] for values in run.history if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [values["step"] for values in run.history if "eval_loss" in values] == [1, 2, 3, 4, 5, 6]
    assert list(service.runs) == [json.loads((tmp_path / "wandb_run.json").read_text())["id"]]
    assert service.settings[1]["config"] == {"save_steps": 2}
    assert service.settings[1]["allow_val_change"]


def test_steps_that_are_repeated_are_sent_and_said(service, tmp_path, capsys):
    """After a kill the log is cut to the checkpoint. W&B ignores older steps of its own without a word."""
    log(tmp_path, range(1, 7))
    runs_folder.cut_log(tmp_path, 4)
    capsys.readouterr()
    log(tmp_path, range(5, 8))
    (run,) = service.runs.values()
    losses = [values["step"] for values in run.history if "loss" in values]
    assert losses == [1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert run.axes == {"step": None, "*": "step"}
    assert "W&B has steps up to 6. Those after 4 are repeated" in capsys.readouterr().out


def test_another_run_in_the_folder_is_another_run_at_the_service(service, tmp_path):
    """--overwrite deletes what the folder holds of the old run, and the id with it."""
    log(tmp_path, range(1, 3))
    runs_folder.delete(runs_folder.contents(tmp_path))
    log(tmp_path, range(1, 3))
    assert len(service.runs) == 2


def test_a_run_of_an_earlier_version_has_no_id(service, tmp_path, capsys):
    """Then another W&B run begins, which is said."""
    log(tmp_path, range(1, 3))
    assert "another W&B run begins" not in capsys.readouterr().out
    (tmp_path / "wandb_run.json").unlink()
    (tmp_path / "wandb").mkdir()
    log(tmp_path, range(3, 5))
    assert len(service.runs) == 2
    assert "another W&B run begins" in capsys.readouterr().out


def test_what_the_user_can_do_when_the_run_is_gone_or_its_file_is_damaged(service, tmp_path):
    """A deleted W&B run cannot be continued; the message names the file to delete."""
    log(tmp_path, range(1, 3))
    service.deleted.update(service.runs)
    with pytest.raises(UserError, match="previously created and deleted") as caught:
        log(tmp_path, range(3, 5))
    assert f"delete {tmp_path / 'wandb_run.json'}" in caught.value.fix
    for text in ("{", "[]", '{"id": 3}'):
        (tmp_path / "wandb_run.json").write_text(text)
        with pytest.raises(UserError, match=r"wandb_run\.json") as caught:
            log(tmp_path, range(3, 5))
        assert "Delete this file" in caught.value.fix
