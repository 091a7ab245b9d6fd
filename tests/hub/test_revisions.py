"""A name of the hub given to a program: its commit is reported and recorded, and so is a moved branch (S9).

The hub is a stand-in on the loopback address and its cache a folder of the test; the programs run as users
run them.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import get_session
from safetensors.torch import load_file, save_file

from onecard.config.declaration import Hub
from onecard.errors import USAGE, UserError
from onecard.hub import client, manifest, model_files, remote_code, revisions
from onecard.hub import locate as hub_locate
from onecard.inference import base_choice
from onecard.models import base_model
from onecard.runs import adapters as runs_adapters
from onecard.training import recorded_names
from tests.support import fake_hub, tiny
from tests.support.fake_hub import Repository
from tests.support.paths import ROOT

NAME = "someone/model"
OLD, NEW, GONE = "a" * 40, "b" * 40, "c" * 40
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
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--someone--model"
    for commit, folder in folders.items():
        shutil.copytree(folder, place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(NEW)
    return place


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The lines that are printed about names."""
    lines: list[str] = []
    for module in (revisions, remote_code):
        monkeypatch.setattr(module, "say", lines.append)
    return lines


@pytest.fixture
def asking(monkeypatch) -> None:
    """Locating or fetching a name gives a text that says so, and nothing else happens."""
    for function in ("locate", "fetch_dataset"):
        monkeypatch.setattr(hub_locate, function, "asked {}".format)


def run(program: str, address: str, home: Path, *flags: object, offline: int = 0, **options: object) -> str:
    """Run a program, which must succeed, and return its output."""
    hub = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(offline)}
    arguments = [*map(str, flags), *(f"--{name}={value}" for name, value in options.items())]
    command = [sys.executable, str(ROOT / program), *arguments]
    settings = {"capture_output": True, "text": True, "cwd": home.parent, "input": "Hello\n"}
    process = subprocess.run(command, env={**os.environ, **hub, "OMP_NUM_THREADS": "2"}, **settings)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_a_name_stays_at_its_commit(folders, tmp_path):
    """Training, continuing, talking and merging use the run's commit and report that the branch moved."""
    home, folder = tmp_path / "home", tmp_path / "run"
    rows = tiny.save_rows(tmp_path / "rows.json", 8)
    hub = Repository(dict(folders), OLD)
    moved = f"{NAME} has moved from {OLD[:12]} to {NEW[:12]}; the first, which was trained on, is used"
    with fake_hub.serving(NAME, hub) as address:
        output = run(
            "finetune.py", address, home, model_path=NAME, data_path=rows, output_path=folder, **QUIET
        )
        assert output.count(f"{NAME} is commit {OLD}") == 1
        stored = json.loads((folder / "finetune_config.json").read_text())
        assert stored["options"]["model_path"] == NAME
        assert stored["resolved"]["base"] == f"{NAME}@{OLD}"
        adapter = json.loads((folder / "adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == (NAME, OLD)

        output = run("finetune_continue.py", address, home, output_path=folder, max_steps=2)
        assert "has moved" not in output

        hub.branch = NEW
        hub.asked.clear()
        output = run("finetune_continue.py", address, home, output_path=folder, max_steps=3)
        assert f"hub         {NAME} is commit {OLD}" in output
        talk = ("--terminal", "--mode=greedy", "--max_new_tokens=2", "--device=cpu", f"--lora_path={folder}")
        assert f"hub         {NAME} is commit {OLD}" in run("interaction.py", address, home, *talk)
        merge = {"lora_path": folder, "output_path": tmp_path / "out"}
        assert f"hub         {NAME} is commit {OLD}" in run("tools/merge_lora.py", address, home, **merge)
        assert hub.asked == []  # none of these commands names the model
        assert moved in run("interaction.py", address, home, *talk, model_path=NAME)
        assert hub.asked == [f"/api/models/{NAME}/revision/main"]
        output = run("interaction.py", address, home, *talk, model_path=f"{NAME}@main")
        assert f"commit {OLD} was trained on, {NEW} is used" in output
        assert moved in run("tools/merge_lora.py", address, home, **merge, model_path=NAME)
        versions = json.loads((tmp_path / "out" / "onecard.json").read_text())["versions"]
        assert versions == {"model_path": f"{NAME}@{OLD}"}

        warm = {"model_path": NAME, "data_path": rows, "output_path": tmp_path / "warm", "lora_path": folder}
        output = run("finetune.py", address, home, **warm, **QUIET)
        assert f"commit {OLD} was trained on, {NEW} is used" in output

        output = run("tools/perplexity.py", address, home, rows, model_path=NAME, device="cpu", max_tokens=64)
        assert f"{NAME} is commit {NEW}" in output
    assert stored["fingerprints"] == json.loads((folder / "finetune_config.json").read_text())["fingerprints"]


def test_a_move_since_the_last_fetch_is_told(folders, tmp_path):
    """A name without a record means its newest commit, which is reported, and offline the fetched one."""
    hub = Repository(dict(folders), OLD)
    with fake_hub.serving(NAME, hub) as address:
        fake_hub.fetch(address, tmp_path / "home", "locate", NAME)
        snapshot = next((tmp_path / "home").rglob(OLD))
        (snapshot / "pytorch_model.bin").write_bytes(b"")  # another program's file, which is not loaded
        lines = fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME).splitlines()
        assert lines[0].endswith(f"{NAME} is commit {OLD}")
        assert Path(lines[-1]).name == OLD
        assert (Path(lines[-1]) / WEIGHTS).is_file()
        hub.branch = NEW
        lines = fake_hub.fetch(address, tmp_path / "home", "locate", NAME).splitlines()
        assert f"main has moved from {OLD[:12]} to {NEW[:12]} since it was last fetched" in lines[0]
        assert f"{NAME}@{OLD}" in lines[0]
        assert Path(lines[-1]).name == NEW
        assert not (Path(lines[-1]) / WEIGHTS).exists()  # a tokenizer needs none
        lines = fake_hub.fetch(address, tmp_path / "home", "locate", f"{NAME}@{OLD}").splitlines()
        assert [Path(lines[-1]).name, len(lines)] == [OLD, 2]
    lines = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{OLD}").splitlines()
    assert Path(lines[-1]).name == OLD
    lines = fake_hub.fetch(address, tmp_path / "home", "locate", NAME).splitlines()
    # only that commit has its weights here
    assert f"the hub did not answer (ConnectError); commit {OLD} of the cache is used" in lines[0]


def test_a_commit_that_is_gone_from_the_hub(folders, tmp_path):
    """After a branch was rewritten, what was fetched before is still used."""
    hub = Repository(dict(folders), OLD)
    with fake_hub.serving(NAME, hub) as address:
        fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME)
        for tree in (tmp_path / "home").rglob("trees"):
            shutil.rmtree(tree)
        del hub.commits[OLD]
        hub.branch = NEW
        output = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{OLD}").splitlines()
        assert Path(output[-1]).name == OLD
        output = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{'c' * 40}")
        assert "cannot be fetched" in output


def test_an_adapter_by_its_name(tmp_path):
    """The commit of an adapter and its moves are reported like those of a base model."""
    one, two = (tmp_path / name for name in ("one", "two"))
    for folder in (one, two):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"r": len(folder.name)}))
    hub = Repository({OLD: one, NEW: two}, OLD)
    with fake_hub.serving("someone/lora", hub) as address:
        output = fake_hub.fetch(address, tmp_path / "home", "fetch_adapter", "someone/lora")
        assert f"someone/lora is commit {OLD}" in output
        hub.branch = NEW
        output = fake_hub.fetch(address, tmp_path / "home", "fetch_adapter", "someone/lora")
        assert f"from {OLD[:12]} to {NEW[:12]}" in output
    assert runs_adapters.read_list(f"someone/lora@{OLD}:0.5") == [("lora", f"someone/lora@{OLD}", 0.5)]


def test_a_folder_says_its_version(cached, said, tmp_path, monkeypatch):
    """The version of a snapshot, a download and a file in a snapshot is known; other folders have none."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "own"))
    assert str(revisions.of(cached / "snapshots" / OLD)) == f"{NAME}@{OLD}"
    assert str(revisions.of(cached / "snapshots" / OLD / "config.json")) == f"{NAME}@{OLD}"
    assert (
        revisions.of(cached) is revisions.of(tmp_path) is revisions.of(cached / "snapshots" / "main") is None
    )
    other = manifest.place("other/model")
    other.mkdir(parents=True)
    values = {"source": "hub", "name": "other/model", "revision": "main", "commit": NEW, "endpoint": ""}
    manifest.write(other, {**values, "files": {}})
    assert str(revisions.of(other)) == f"other/model@{NEW}"
    assert revisions.at_hand("other/model") == revisions.at_hand(f"other/model@{NEW}") == other
    assert revisions.at_hand(f"other/model@{OLD}") is None
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / manifest.NAME).write_text("{}")
    assert revisions.of(tmp_path / "damaged") is None
    revisions.compare(f"other/model@{OLD}", cached)
    assert said == []  # another folder is in use
    revisions.compare(f"other/model@{OLD}", other)
    assert f"commit {OLD} was trained on, {NEW} is used" in said[0]
    revisions.tell_move(f"other/model@{OLD}")
    assert f"from {OLD[:12]} to {NEW[:12]}" in said[1]


@pytest.mark.parametrize(
    ("recorded", "asked", "base"),
    [
        (f"{NAME}@{OLD}", None, OLD),
        (f"{NAME}@{OLD}", NAME, OLD),
        (f"{NAME}@{OLD}", f"{NAME}@main", f"{NAME}@main"),
        (f"{NAME}@{OLD}", "other/model", "other/model"),
        (NAME, None, NEW),  # the commit in the cache; a record fetches nothing newer
        (NAME, NAME, NAME),
    ],
)
def test_which_base_an_adapter_gets(cached, recorded, asked, base):
    adapter = runs_adapters.Adapter("adapter", Path("a"), base=recorded)
    assert base_choice.base_of(adapter, asked) == (
        str(cached / "snapshots" / base) if base in (OLD, NEW) else base
    )


def test_a_recorded_commit_that_is_not_here_is_fetched_when_its_name_is_typed(cached, capsys):
    """Exactly that commit is fetched, and the output says so."""
    shutil.rmtree(cached / "snapshots" / OLD)
    adapter = runs_adapters.Adapter("adapter", Path("a"), base=f"{NAME}@{OLD}")
    assert base_choice.base_of(adapter, NAME) == f"{NAME}@{OLD}"
    line = f"hub         {NAME}: commit {OLD}, which was trained on, is not here and is fetched"
    assert capsys.readouterr().out.splitlines() == [line]


def test_a_recorded_commit_that_is_not_here_is_not_replaced(cached):
    """The error names both commits and both ways to continue."""
    shutil.rmtree(cached / "snapshots" / OLD)
    adapter = runs_adapters.Adapter("adapter", Path("a"), base=f"{NAME}@{OLD}")
    with pytest.raises(UserError, match=f"{OLD}, which is not on this machine; here is {NEW}") as caught:
        base_choice.base_of(adapter, None)
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
    """The commit in peft's own field is used only when it is a commit."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **values}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert runs_adapters.find(str(tmp_path), "adapter", "best", tmp_path).base == base


@pytest.mark.parametrize(
    ("fails", "reason"),
    [
        (401, "the hub refuses it (401)"),
        (403, "the hub refuses it (403)"),
        (404, "the hub refuses it (404)"),
        (429, "the hub did not answer (429)"),
        (503, "the hub did not answer (503)"),
        (None, "the hub did not answer (no answer in 5 seconds)"),
    ],
)
def test_a_hub_that_gives_nothing(folders, tmp_path, fails, reason):
    """What is cached is used and the reason is reported; what is not cached is refused."""
    hub = Repository(dict(folders), OLD)
    with fake_hub.serving(NAME, hub) as address:
        fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME)
        hub.silent, hub.fails = fails is None, {"/": fails} if fails else {}
        hub.asked.clear()
        lines = fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME).splitlines()
        assert lines[0] == f"hub         {NAME}: {reason}; commit {OLD} of the cache is used"
        assert Path(lines[-1]).name == OLD
        assert len(hub.asked) == 1
        lines = fake_hub.fetch(address, tmp_path / "home", "fetch_model", f"{NAME}@{OLD}").splitlines()
        assert lines[0] == f"hub         {NAME} is commit {OLD}"
        assert len(hub.asked) == 1  # a commit in the cache is not asked for
        assert "cannot be fetched" in fake_hub.fetch(address, tmp_path / "other", "fetch_model", NAME)


def test_a_silent_hub_is_left_alone(cached, said, monkeypatch):
    """A program waits only once for all its names, whatever keeps the hub from answering."""
    requests: list[str] = []
    never = threading.Event()

    def answer(_: object, name: str, **__: object) -> None:
        requests.append(name)
        never.wait()

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", answer)
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    monkeypatch.setattr(client, "_silence", {"until": 0.0})
    assert revisions.fetch(NAME, revisions.MODEL, model_files.SETTINGS).name == NEW
    assert "no answer in 0.2 seconds" in said[0]
    with pytest.raises(TimeoutError):
        revisions.fetch("someone/other", revisions.MODEL, model_files.SETTINGS)
    never.set()
    assert requests == [NAME]


def test_files_that_a_hub_holds_back(folders, tmp_path):
    """The hub gives the commit but not its files (403): what was fetched before is used."""
    hub = Repository(dict(folders), OLD)
    with fake_hub.serving(NAME, hub) as address:
        fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME)
        hub.branch, hub.fails = NEW, {"/resolve/": 403}
        for _ in range(2):  # a move is reported again while its files are not fetched
            lines = fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME).splitlines()
            assert f"main has moved from {OLD[:12]} to {NEW[:12]}" in lines[0]
            assert f"commit {OLD} of the cache is used" in lines[1]
            assert Path(lines[-1]).name == OLD
        hub.fails = {}
        lines = fake_hub.fetch(address, tmp_path / "home", "fetch_model", NAME).splitlines()
        assert f"main has moved from {OLD[:12]} to {NEW[:12]}" in lines[0]
        assert lines[1] == f"hub         {NAME} is commit {NEW}"


def test_a_list_of_files_that_never_comes(folders, tmp_path, cached, monkeypatch):
    """The hub's client sets no time limit there, so every wait is given one."""
    request = httpx2.Request("GET", "http://127.0.0.1/", extensions={"timeout": {"read": None, "write": 3.0}})
    client._end_in_time(request)
    limits = {"connect": 5.0, "read": 5.0, "write": 3.0, "pool": 5.0}
    assert request.extensions["timeout"] == limits
    hooks: list[object] = []
    monkeypatch.setattr(
        revisions,
        "snapshot_download",
        lambda *_, **__: hooks.extend(get_session().event_hooks["request"]) or "x",
    )
    revisions._bring(revisions.Version(NAME, OLD), ("*",))
    assert client._end_in_time in hooks


def test_a_snapshot_given_as_a_folder_is_nobodys_question(cached, monkeypatch):
    """A snapshot given as a folder is not completed, whole or not, because no name was given."""
    monkeypatch.setattr(revisions, "_bring", lambda *_: pytest.fail("asked"))
    hub_locate.fetch_model(str(cached / "snapshots" / OLD))
    (cached / "snapshots" / OLD / WEIGHTS).unlink()
    hub_locate.fetch_model(str(cached / "snapshots" / OLD))
    base_model.fetch_weights(str(cached / "snapshots" / OLD))


def test_settings_alone_are_no_base_that_is_here(cached):
    """No adapter's record leads to a snapshot without weights; another snapshot with weights is used."""
    (cached / "snapshots" / NEW / WEIGHTS).unlink()
    assert not base_choice.is_here(f"{NAME}@{NEW}")
    assert revisions.at_hand(NAME) == cached / "snapshots" / OLD
    (cached / "snapshots" / OLD / WEIGHTS).unlink()
    assert not base_choice.is_here(NAME)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (cached / "snapshots" / OLD / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    (cached / "snapshots" / OLD / "one.safetensors").write_bytes(b"")
    assert not base_choice.is_here(NAME)
    (cached / "snapshots" / OLD / "two.safetensors").write_bytes(b"")
    assert base_choice.is_here(NAME)


def test_modelscope_is_another_source(cached, said, tmp_path, monkeypatch):
    """Commits of ModelScope are compared and reported, but never looked up at the hub."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(client, "ask_commit", lambda *_: pytest.fail("asked"))
    folder = manifest.place(NAME)
    folder.mkdir(parents=True)
    values = {"source": "modelscope", "name": NAME, "revision": "master", "commit": OLD, "endpoint": ""}
    manifest.write(folder, {**values, "files": {}})
    version = f"modelscope:{NAME}@{OLD}"
    assert str(revisions.of(folder)) == version
    assert revisions.parsed(version) == revisions.of(folder)
    assert revisions.recorded(NAME, version) == NAME  # found where tools/download.py put it
    assert revisions.fetch(NAME, revisions.MODEL, ()) == folder
    assert said.pop() == f"modelscope  {NAME} is commit {OLD}, which is in {folder}"
    revisions.compare(version, folder)
    assert said == []
    revisions.compare(version, cached / "snapshots" / OLD)
    assert said == [f"modelscope  {NAME}: commit {OLD} of ModelScope was trained on, {OLD} is used"]


@pytest.mark.parametrize("revision", ["main", "v1.0"])
def test_a_branch_beside_the_commit_whose_code_is_read(cached, said, revision):
    assert remote_code.locate_with_code(f"{NAME}@{revision}", OLD) == NAME
    assert f"commit {OLD} of --remote_code is used" in said.pop()
    assert remote_code.locate_with_code(f"{NAME}@{OLD}", OLD) == NAME
    assert not said


def test_another_commit_than_the_one_whose_code_is_read(cached):
    with pytest.raises(UserError, match="name two commits") as caught:
        remote_code.locate_with_code(f"{NAME}@{NEW}", OLD)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(
    ("recorded", "typed", "found"),
    [
        (f"{NAME}@{OLD}", {}, OLD),
        (f"{NAME}@{OLD}", {Hub.BASE: [NAME]}, OLD),
        (f"{NAME}@{GONE}", {Hub.BASE: [NAME]}, f"{NAME}@{GONE}"),
        (f"{NAME}@{GONE}", {}, None),
        (None, {}, NEW),
    ],
)
def test_the_base_of_a_run_that_goes_on(cached, asking, recorded, typed, found):
    """The recorded commit is used, and it is fetched only if its name was typed."""
    stored = {"resolved": {"base": recorded}}
    locate = recorded_names.Names(stored, typed).base
    if found is None:
        with pytest.raises(UserError, match=f"{GONE} is not on this machine"):
            locate(NAME)
    elif found in (OLD, NEW):
        assert locate(NAME) == str(cached / "snapshots" / found)
    else:
        assert locate(NAME) == f"asked {found}"
    assert locate("demo") == "asked demo"
    assert locate(str(cached)) == f"asked {cached}"


def test_the_rows_of_a_run_that_goes_on(cached, asking):
    """A dataset is used at its recorded commit in the cache; the hub is only asked for a typed name."""
    place = cached.parent / "datasets--someone--rows" / "snapshots" / OLD
    place.mkdir(parents=True)
    stored = {"data": {"versions": [f"someone/rows@{OLD}"]}}
    with pytest.raises(UserError, match="are not on this machine"):  # an empty snapshot
        recorded_names.Names(stored).rows("someone/rows")
    (place / "rows.json").write_text("[]")
    assert recorded_names.Names(stored).rows("someone/rows") == str(place)
    with pytest.raises(UserError, match="are not on this machine"):
        recorded_names.Names(stored, {Hub.ROWS: ["a.json"]}).rows("other/rows")
    typed = {Hub.ROWS: ["a.json, someone/rows:2"]}
    assert recorded_names.Names(stored, typed).rows("someone/rows") == "asked someone/rows"


def test_the_names_of_a_run_that_begins_were_typed(cached, asking):
    assert recorded_names.NEW_NAMES.base(NAME) == f"asked {NAME}"
    assert recorded_names.NEW_NAMES.rows("someone/rows") == "asked someone/rows"


def test_a_stored_name_with_a_branch_has_its_commit(cached, asking):
    """A run begun with name@main stays at its commit; a typed name@main follows the branch."""
    stored = {"resolved": {"base": f"{NAME}@{OLD}"}}
    assert recorded_names.Names(stored).base(f"{NAME}@main") == str(cached / "snapshots" / OLD)
    typed = {Hub.BASE: [f"{NAME}@main"]}
    assert recorded_names.Names(stored, typed).base(f"{NAME}@main") == f"asked {NAME}@main"


@pytest.mark.parametrize("branch", ["/etc/passwd", "../../../x", "..", "x/../../../../x"])
def test_a_revision_that_is_a_path(cached, branch):
    """Such a revision leads to nothing outside of the cache."""
    assert revisions.at_hand(f"{NAME}@{branch}") is None


def test_a_branch_that_cannot_be_read(cached):
    """A file that holds no commit is ignored; the snapshots are still there."""
    (cached / "refs" / "main").write_bytes(b"\xff\xfe")
    assert revisions.at_hand(NAME).parent == cached / "snapshots"


def test_a_cache_on_another_disk(cached, tmp_path, monkeypatch):
    """Versions are known when a repository's folder is a link and when the path of the cache has dots."""
    cached.rename(tmp_path / "elsewhere")
    cached.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "x").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "x" / ".." / cached.parent))
    for revision in (OLD, "main"):
        folder = revisions.at_hand(f"{NAME}@{revision}")
        assert folder is not None
        assert revisions.of(folder).name == NAME


def test_a_full_disk_is_no_silent_hub(cached, said, monkeypatch):
    """An older commit is not used instead."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(client, "ask_commit", lambda *_: GONE)
    monkeypatch.setattr(revisions, "snapshot_download", full)
    with pytest.raises(OSError, match="No space"):
        revisions.fetch(NAME, revisions.MODEL, ("*",))
    assert not any("of the cache is used" in line for line in said)


@pytest.mark.parametrize("use", [hub_locate.fetch_model, base_model.fetch_weights])
def test_weights_that_the_disk_has_no_room_for(cached, monkeypatch, use):
    """Whoever fetches the weights gets the disk's own error, not one about fetching."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(revisions, "complete", full)
    with pytest.raises(OSError, match="No space"):
        use(str(cached))


def test_an_endpoint_that_is_no_address(cached, monkeypatch):
    """Whatever error the client makes of it becomes one of the refusals."""

    def odd(*_: object, **__: object) -> None:
        raise KeyError("sha")

    monkeypatch.setattr(client.HfApi, "repo_info", odd)
    with pytest.raises(ValueError, match="KeyError"):
        client.ask_commit(NAME, revisions.MODEL, "main")
