"""A hub's name given straight to a program: its commit is said and recorded, a moved branch is told (S9).

The hub is a stand-in on the loopback address, its cache a folder of the test; programs run as users run them.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from onecard import commits, receipt, sources
from onecard.errors import UserError
from tests import fake_hub, tiny
from tests.fake_hub import Repository

ROOT = Path(__file__).parent.parent
NAME = "someone/model"
OLD, NEW = "a" * 40, "b" * 40
WEIGHTS = "model.safetensors"
QUIET = {"device": "cpu", "bits": 16, "template": "alpaca", "test_size": 0, "max_steps": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Two commits of a model; the second has other weights."""
    place = tmp_path_factory.mktemp("commits")
    old = tiny.save_model(place / "old")
    new = Path(shutil.copytree(old, place / "new"))
    save_file({k: v * 1.5 for k, v in load_file(new / WEIGHTS).items()}, new / WEIGHTS, {"format": "pt"})
    return {OLD: old, NEW: new}


@pytest.fixture
def cached(folders, tmp_path, monkeypatch) -> Path:
    """The cache of the hub in this process, with both commits; main was at the second when it was fetched."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / "models--someone--model"
    for commit, folder in folders.items():
        shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(NEW)
    return place


def run(program: str, address: str, home: Path, *flags: object, offline: int = 0, **options: object) -> str:
    """What a program says; it ends well."""
    hub = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(offline)}
    given = [*map(str, flags), *(f"--{name}={value}" for name, value in options.items())]
    command = [sys.executable, str(ROOT / program), *given]
    settings = {"capture_output": True, "text": True, "cwd": home.parent, "input": "Hello\n"}
    ended = subprocess.run(command, env={**os.environ, **hub, "OMP_NUM_THREADS": "2"}, **settings)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_a_name_stays_at_its_commit(folders, tmp_path):
    """Trained, continued, talked with, merged: the run's commit all the way, and the move is told."""
    home, made = tmp_path / "home", tmp_path / "run"
    rows = tiny.save_rows(tmp_path / "rows.json", 8)
    hub = Repository(dict(folders), OLD)
    moved = f"{NAME} has moved from {OLD[:12]} to {NEW[:12]}; the first, which was trained on, is used"
    with fake_hub.serving(NAME, hub) as address:
        said = run("finetune.py", address, home, model_path=NAME, data_path=rows, output_path=made, **QUIET)
        assert said.count(f"{NAME} is commit {OLD}") == 1
        stored = json.loads((made / "finetune_config.json").read_text())
        assert stored["options"]["model_path"] == NAME
        assert stored["resolved"]["base"] == f"{NAME}@{OLD}"
        adapter = json.loads((made / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, OLD)

        said = run("finetune_continue.py", address, home, output_path=made, max_steps=2)
        assert "has moved" not in said

        hub.branch = NEW
        said = run("finetune_continue.py", address, home, output_path=made, max_steps=3)
        assert moved in said
        assert "hub         someone/model is commit " + OLD in said
        talk = ("--terminal", "--mode=greedy", "--max_new_tokens=2", "--device=cpu", f"--lora_path={made}")
        assert moved in run("interaction.py", address, home, *talk)
        assert moved in run("interaction.py", address, home, *talk, model_path=NAME)
        said = run("interaction.py", address, home, *talk, model_path=f"{NAME}@main")
        assert f"commit {OLD} was trained on, {NEW} is used" in said
        assert moved in run(
            "tools/merge_lora.py", address, home, lora_path=made, output_path=tmp_path / "out"
        )
        noted = json.loads((tmp_path / "out" / "onecard.json").read_text())["versions"]
        assert noted == {"model_path": f"{NAME}@{OLD}"}

        warm = {"model_path": NAME, "data_path": rows, "output_path": tmp_path / "warm", "lora_path": made}
        said = run("finetune.py", address, home, **warm, **QUIET)
        assert f"commit {OLD} was trained on, {NEW} is used" in said

        said = run("tools/perplexity.py", address, home, rows, model_path=NAME, device="cpu", max_tokens=64)
        assert f"{NAME} is commit {NEW}" in said
    assert stored["fingerprints"] == json.loads((made / "finetune_config.json").read_text())["fingerprints"]


def test_a_move_since_the_last_fetch_is_told(folders, tmp_path):
    """A name without a record is what it means now, which is said; without network, what it was."""
    hub = Repository(dict(folders), OLD)
    with fake_hub.serving(NAME, hub) as address:
        said = fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME).splitlines()
        assert said[0].endswith(f"{NAME} is commit {OLD}")
        assert Path(said[-1]).name == OLD
        assert (Path(said[-1]) / WEIGHTS).is_file()
        hub.branch = NEW
        said = fake_hub.fetch(address, tmp_path / "home", "locate", NAME).splitlines()
        assert f"main has moved from {OLD[:12]} to {NEW[:12]} since it was last fetched" in said[0]
        assert f"{NAME}@{OLD}" in said[0]
        assert Path(said[-1]).name == NEW
        assert not (Path(said[-1]) / WEIGHTS).exists()  # a tokenizer needs none
        said = fake_hub.fetch(address, tmp_path / "home", "locate", f"{NAME}@{OLD}").splitlines()
        assert [Path(said[-1]).name, len(said)] == [OLD, 2]
    said = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{OLD}").splitlines()
    assert Path(said[-1]).name == OLD
    said = fake_hub.fetch(address, tmp_path / "home", "locate", NAME).splitlines()
    assert said[0].endswith(f"{NAME} is commit {NEW}")


def test_a_commit_that_is_gone_from_the_hub(folders, tmp_path):
    """A rewritten branch: what was fetched before is still used."""
    hub = Repository(dict(folders), OLD)
    with fake_hub.serving(NAME, hub) as address:
        fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME)
        for tree in (tmp_path / "home").rglob("trees"):
            shutil.rmtree(tree)
        del hub.commits[OLD]
        hub.branch = NEW
        said = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{OLD}").splitlines()
        assert Path(said[-1]).name == OLD
        said = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{'c' * 40}")
        assert "cannot be fetched" in said


def test_an_adapter_by_its_name(tmp_path):
    """Its commit is said, and moves are told, as a base's."""
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": len(folder.name)}))
    hub = Repository({OLD: one, NEW: two}, OLD)
    with fake_hub.serving("someone/lora", hub) as address:
        said = fake_hub.fetch(address, tmp_path / "home", "fetch_adapter", "someone/lora")
        assert f"someone/lora is commit {OLD}" in said
        hub.branch = NEW
        said = fake_hub.fetch(address, tmp_path / "home", "fetch_adapter", "someone/lora")
        assert f"from {OLD[:12]} to {NEW[:12]}" in said
    assert sources.read_list(f"someone/lora@{OLD}:0.5") == [("lora", f"someone/lora@{OLD}", 0.5)]


def test_a_folder_says_its_version(cached, tmp_path, monkeypatch):
    """A snapshot by its name, a download by its receipt, a file in a snapshot; others say nothing."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "own"))
    assert str(commits.of(cached / "snapshots" / OLD)) == f"{NAME}@{OLD}"
    assert str(commits.of(cached / "snapshots" / OLD / "config.json")) == f"{NAME}@{OLD}"
    assert commits.of(cached) is commits.of(tmp_path) is commits.of(cached / "snapshots" / "main") is None
    other = receipt.place("other/model")
    other.mkdir(parents=True)
    values = {"source": "hub", "name": "other/model", "revision": "main", "commit": NEW, "endpoint": ""}
    receipt.write(other, {**values, "files": {}})
    assert str(commits.of(other)) == f"other/model@{NEW}"
    assert commits.at_hand("other/model") == commits.at_hand(f"other/model@{NEW}") == other
    assert commits.at_hand(f"other/model@{OLD}") is None
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / receipt.NAME).write_text("{}")
    assert commits.of(tmp_path / "damaged") is None
    said: list[str] = []
    commits.compare(f"other/model@{OLD}", cached, said.append)
    assert f"from {OLD[:12]} to {NEW[:12]}" in " ".join(said)


@pytest.mark.parametrize(
    ("recorded", "asked", "base"),
    [
        (f"{NAME}@{OLD}", None, f"{NAME}@{OLD}"),
        (f"{NAME}@{OLD}", NAME, f"{NAME}@{OLD}"),
        (f"{NAME}@{OLD}", f"{NAME}@main", f"{NAME}@main"),
        (f"{NAME}@{OLD}", "other/model", "other/model"),
        (NAME, None, f"{NAME}@{NEW}"),  # what is here, and nothing newer on its word
        (NAME, NAME, NAME),
    ],
)
def test_which_base_an_adapter_gets(cached, recorded, asked, base):
    found = sources.Source("adapter", Path("a"), base=recorded)
    assert sources.base_of(found, asked) == base


@pytest.mark.parametrize("asked", [None, NAME])
def test_a_recorded_commit_that_is_not_here_is_not_replaced(cached, asked):
    """Both commits are named, and both ways on."""
    shutil.rmtree(cached / "snapshots" / OLD)
    found = sources.Source("adapter", Path("a"), base=f"{NAME}@{OLD}")
    with pytest.raises(UserError, match=f"{OLD}, which is not on this machine; here is {NEW}") as caught:
        sources.base_of(found, asked)
    assert f"--model_path {NAME}@{OLD}" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "base"),
    [
        ({"base_model_name_or_path": NAME, "revision": OLD}, f"{NAME}@{OLD}"),
        ({"base_model_name_or_path": NAME, "revision": "main"}, NAME),
        ({"base_model_name_or_path": NAME, "revision": "../../x"}, NAME),
        ({"base_model_name_or_path": "/some/folder", "revision": OLD}, "/some/folder"),
    ],
)
def test_what_an_adapters_settings_say(tmp_path, values, base):
    """peft's own field for the commit, taken only when it is one."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert sources.find(str(tmp_path), "adapter", "best", str, tmp_path).base == base
