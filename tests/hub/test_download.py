"""Downloads from a hub that fails: a finished folder has exactly the listed bytes, else there is none."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from onecard.config.chat import ChatConfig
from onecard.config.tools import DownloadConfig
from onecard.errors import CHECKPOINT, DISK, UNSAFE, USAGE, UserError
from onecard.hub import addresses, destination, locate, manifest, transfer
from onecard.hub import download as hub_download
from onecard.inference import base_choice, loader, resolve
from onecard.inference.resolve import ModelRequest
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.system import hashing, lock
from tests.support import bad_hub
from tests.support.bad_hub import NAME, download
from tests.support.paths import ROOT

WEIGHTS = "model.safetensors"
TOKEN = "hf_secret_of_this_test"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """The network is allowed, waits are short, and each test has its own caches and tokens."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transfer, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(transfer, "LONGEST_WAIT", 0.01)
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    for name in ("HF_TOKEN", "HF_ENDPOINT", "MODELSCOPE_API_TOKEN", "MODELSCOPE_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def other_is_public(monkeypatch):
    """This machine's other name stands for a public host."""
    monkeypatch.setattr(addresses, "is_public", lambda _: True)


def content(size: int = 300_000, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def model_files(seed: int = 0) -> dict[str, bytes]:
    return {"config.json": b'{"model_type": "llama"}', WEIGHTS: content(seed=seed), "README.md": b"hello"}


@pytest.fixture
def served():
    """A hub with one model."""
    with bad_hub.serving(bad_hub.hub_of(model_files())) as hub:
        yield hub


def refused(served: bad_hub.Hub, folder: Path | None, code: int, **options) -> str:
    with pytest.raises(UserError) as caught:
        download(served, folder, **options)
    assert caught.value.code == code
    return str(caught.value)


def connected(served: bad_hub.Hub):
    return transfer.connect(addresses.Hosts([served.address]))


def inside(folder: Path) -> list[str]:
    return (
        sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*")) if folder.exists() else []
    )


def parts(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{transfer.PART}"))


def check_whole(folder: Path, served: bad_hub.Hub) -> None:
    """Check that the folder holds the listed bytes, a correct receipt and nothing else."""
    files = served.commits[served.branch]
    assert inside(folder) == sorted(["config.json", WEIGHTS, manifest.NAME])
    for name in ("config.json", WEIGHTS):
        assert (folder / name).read_bytes() == files[name]
    stored = json.loads((folder / manifest.NAME).read_text())
    assert stored["commit"] == served.branch
    assert stored["files"][WEIGHTS]["sha256"] == hashlib.sha256(files[WEIGHTS]).hexdigest()


def test_only_what_a_model_needs_is_fetched(served, tmp_path):
    """Weights and settings are fetched, but no code, pickles or read-me; the commit is recorded."""
    served.commits[served.branch] |= {
        "modeling_x.py": b"open('canary', 'w')",
        "pytorch_model.bin": b"pickle",
        "onnx/config.json": b"{}",
        "consolidated.safetensors": b"twice",
        manifest.NAME: b"{}",
    }
    lines = download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)
    assert any(served.branch in line for line in lines)
    assert not served.files("modeling_x.py")
    assert not served.files("pytorch_model.bin")


@pytest.mark.parametrize(
    "faults",
    [
        [1000],
        [100_000, 50_000, 1],
        ["stall"],
        [(429, {"Retry-After": "0"}), (503, {}), (500, {}), 200_000],
        [0, 0, 0, 0],
        [150_000, "no ranges"],
        ["elsewhere"],
        [150_000, "elsewhere"],
    ],
    ids=str,
)
def test_a_bad_line_is_survived(served, tmp_path, faults, monkeypatch, other_is_public):
    """After cuts, stalls, 429, 5xx or a server without ranges the bytes are right in the end (X12)."""
    monkeypatch.setattr(transfer, "SILENCE", 0.3)
    served.faults[WEIGHTS] = list(faults)
    download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)
    assert served.faults[WEIGHTS] == []  # all faults happened


def test_a_cut_is_continued_and_not_begun_again(served, tmp_path):
    served.faults[WEIGHTS] = [200_000]
    download(served, tmp_path / "m")
    ranges = [headers.get("Range") for _, _, headers in served.files(WEIGHTS)]
    assert ranges == [None, "bytes=200000-"]
    assert served.files(WEIGHTS)[1][2]["If-Range"].startswith('"')


def test_random_cuts(tmp_path):
    """A hundred files, each cut at three random places, never have a wrong byte."""
    rng, data = random.Random(5), content(20_000)
    digest = hashlib.sha256(data).hexdigest()
    with bad_hub.serving(bad_hub.hub_of({"x": data})) as served, connected(served) as client:
        for number in range(100):
            served.faults["x"] = [rng.randrange(6_500) for _ in range(3)]
            file = transfer.Remote("x", f"{served.address}/plain/x", len(data), "sha256", digest)
            with tqdm(disable=True) as bar:
                part = transfer.fetch(client, file, tmp_path / str(number), {}, bar)
            assert part.read_bytes() == data
            assert served.faults["x"] == []


def test_a_stopped_run_is_continued(served, tmp_path):
    """A run that gives up leaves only .part files, and the next one fetches only the rest."""
    served.faults[WEIGHTS] = [100_000] + [(503, {})] * 20
    message = refused(served, tmp_path / "m", USAGE)
    assert "run the same command again" in message
    assert [path.suffix for path in (tmp_path / "m").iterdir()] == [".part"] * 2
    assert max(path.stat().st_size for path in parts(tmp_path / "m")) == 100_000
    served.faults.clear()
    served.asked.clear()
    download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)
    assert [headers["Range"] for _, _, headers in served.files(WEIGHTS)] == ["bytes=100000-"]


@pytest.mark.parametrize("lie", ["same size", "longer", "shorter", "empty"])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_wrong_bytes_are_never_done(served, tmp_path, lie, name):
    """They are requested twice, removed, and exit 4 (X12); afterwards a correct server succeeds."""
    true = served.commits[served.branch][name]
    wrong = {"same size": bytes(len(true)), "longer": true + b"x", "shorter": true[:-1], "empty": b""}
    served.lies[name] = wrong[lie]
    message = refused(served, tmp_path / "m", CHECKPOINT)
    assert name in message
    assert not (tmp_path / "m" / name).exists()
    assert not any(path.name.startswith(name) for path in parts(tmp_path / "m"))
    assert not (tmp_path / "m" / manifest.NAME).exists()
    served.lies.clear()
    download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)


def test_one_lie_is_forgiven(served, tmp_path):
    """A .part file that holds other bytes is thrown away and fetched anew."""
    download(served, tmp_path / "other")
    digest = hashlib.sha256(model_files()[WEIGHTS]).hexdigest()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / f"{WEIGHTS}.{digest[:12]}.part").write_bytes(bytes(1000))
    download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)


def test_a_file_changed_between_two_pieces(served, tmp_path):
    """The server's file changes while the line is cut: the pieces of both are not joined."""
    served.lies[WEIGHTS] = bytes(len(served.commits[served.branch][WEIGHTS]))
    served.faults[WEIGHTS] = [150_000, "true again"]
    download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)
    ranged = [headers.get("Range") for _, _, headers in served.files(WEIGHTS)]
    assert ranged == [None, "bytes=150000-"]


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/etc/x.json",
        "a/../../x.json",
        "a/./x.json",
        "a//x.json",
        "x\0.json",
        "..\\x.json",
        "a\\b.json",
        "C:x.json",
        "c:/x.json",
        "NUL",
        "a/con.json",
        "lpt1.json",
        "..",
        ".",
        "",
        "x\n.json",
        "x.json ",
        "x.json.",
        "a/.. /x.json",
        "y" * 600,
        "\ud800.json",
        "a\u202eb.json",
    ],
)
@pytest.mark.parametrize("source", ["hub", "modelscope"])
def test_names_that_leave_the_folder(served, tmp_path, name, source):
    """Refused with exit 8 before anything is written (X13)."""
    served.listed["config.json"] = name
    refused(served, tmp_path / "in" / "m", UNSAFE, source=source)
    assert inside(tmp_path / "in") == []
    assert not served.files("/resolve/")


@pytest.mark.parametrize("names", [["a.json", "a.json"], ["a.json", "a.json/b.json"]], ids=str)
def test_two_files_of_one_name(served, tmp_path, names):
    served.commits[served.branch] = {"1": b"{}", "2": b"{}"}
    served.listed.update(zip(("1", "2"), names, strict=True))
    refused(served, tmp_path / "m", UNSAFE, files="*")


def test_links_in_the_folder_are_not_followed(tmp_path):
    """A link in place of a folder, a file or a .part file changes nothing at its target (X13)."""
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "sub").symlink_to(outside)
    with bad_hub.serving(bad_hub.hub_of({"sub/x.json": b"{}"})) as served:
        refused(served, folder, UNSAFE, files="*")
    assert inside(outside) == []
    victim = outside / "victim"
    victim.write_bytes(b"mine")
    (folder / "config.json").symlink_to(victim)
    with bad_hub.serving(bad_hub.hub_of(model_files())) as served:
        refused(served, folder, CHECKPOINT)
        (folder / "config.json").unlink()
        digest = hashlib.sha256(model_files()[WEIGHTS]).hexdigest()
        (folder / f"{WEIGHTS}.{digest[:12]}.part").symlink_to(victim)
        download(served, folder)
    assert victim.read_bytes() == b"mine"
    assert not (folder / WEIGHTS).is_symlink()


def test_files_of_others_are_not_overwritten(served, tmp_path):
    (tmp_path / "config.json").write_text("mine")
    assert "config.json" in refused(served, tmp_path, CHECKPOINT)
    assert (tmp_path / "config.json").read_text() == "mine"
    assert inside(tmp_path) == ["config.json"]


def test_a_repeated_run_does_nothing(served, tmp_path):
    """No file is requested and none is written (X15)."""
    download(served, tmp_path / "m")

    def files() -> dict[Path, tuple[int, ...]]:  # without the time of the last reading
        stats = {path: path.stat() for path in (tmp_path / "m").iterdir()}
        return {path: (stat.st_ino, stat.st_size, stat.st_ctime_ns) for path, stat in stats.items()}

    before = files()
    served.asked.clear()
    lines = download(served, tmp_path / "m")
    assert any("nothing to fetch" in line for line in lines)
    assert [path for _, path, _ in served.asked] == [f"/api/models/{NAME}/revision/main"]
    assert files() == before


def test_damage_on_the_disk_is_found(served, tmp_path):
    """A file with a flipped bit is neither accepted nor overwritten; once deleted, it is fetched anew."""
    download(served, tmp_path / "m")
    path = tmp_path / "m" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert WEIGHTS in refused(served, tmp_path / "m", CHECKPOINT)
    path.unlink()
    download(served, tmp_path / "m")
    check_whole(tmp_path / "m", served)


def test_a_moved_branch_is_told_and_not_followed(served, tmp_path):
    """Old and new commit are named; only --update true or --revision changes the commit (S9)."""
    download(served, tmp_path / "m")
    old = served.branch
    served.branch = bad_hub.commit(2)
    served.commits[served.branch] = model_files(seed=1)
    output = " ".join(download(served, tmp_path / "m"))
    assert old[:12] in output
    assert served.branch[:12] in output
    assert "--update true" in output
    assert json.loads((tmp_path / "m" / manifest.NAME).read_text())["commit"] == old
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == served.commits[old][WEIGHTS]
    (tmp_path / "m" / WEIGHTS).unlink()  # it is completed at its own commit
    download(served, tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == served.commits[old][WEIGHTS]
    download(served, tmp_path / "m", update=True)
    check_whole(tmp_path / "m", served)
    download(served, tmp_path / "m", revision=old)
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == served.commits[old][WEIGHTS]
    assert not any("moved" in line for line in download(served, tmp_path / "m", revision=old))


def test_an_update_removes_what_the_new_version_has_not(served, tmp_path):
    download(served, tmp_path / "m")
    served.branch = bad_hub.commit(2)
    served.commits[served.branch] = {"config.json": b"{}", "model-1.safetensors": content(seed=3)}
    (tmp_path / "m" / "notes.txt").write_text("mine")
    download(served, tmp_path / "m", update=True)
    expected = sorted(["config.json", "model-1.safetensors", "notes.txt", manifest.NAME])
    assert inside(tmp_path / "m") == expected


def test_other_files_of_the_same_version_stay(served, tmp_path):
    """Files of two patterns are both there and in the receipt; a removal is reported."""
    download(served, tmp_path / "m", files="*.safetensors")
    lines = download(served, tmp_path / "m", files="*.json")
    check_whole(tmp_path / "m", served)
    assert not any("Removed" in line for line in lines)
    served.branch = bad_hub.commit(2)
    served.commits[served.branch] = model_files(seed=1)
    lines = download(served, tmp_path / "m", files="*.json", update=True)
    assert any("Removed" in line and WEIGHTS in line for line in lines)
    assert not (tmp_path / "m" / WEIGHTS).exists()


def fetch_list(folder: Path, lines: list[str]) -> None:
    """Fetch the files of such a list, which stays beside the model."""
    path = folder / "list.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    hub_download.run(DownloadConfig(url_list=str(path), to=str(folder / "m")))


def test_an_edited_list_is_followed(served, tmp_path):
    """New lines are fetched, and what was fetched before stays."""

    def bring(*names: str) -> None:
        sums = {name: hashlib.sha256(model_files()[name]).hexdigest() for name in names}
        lines = [f"{served.address}/plain/{name} {name} {digest}" for name, digest in sums.items()]
        fetch_list(tmp_path, lines)

    bring("config.json")
    bring(WEIGHTS)
    check_names = json.loads((tmp_path / "m" / manifest.NAME).read_text())["files"]
    assert sorted(check_names) == sorted(["config.json", WEIGHTS])
    assert inside(tmp_path / "m") == sorted(["config.json", WEIGHTS, manifest.NAME])


def test_the_token_stays_with_its_host(served, tmp_path, monkeypatch, other_is_public):
    """A mirror gets the token only on request, hosts it points to never, and it is never printed (S10)."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    lines = download(served, tmp_path / "a")
    assert all("Authorization" not in headers for _, _, headers in served.asked)
    assert "--send_token" in " ".join(lines)
    served.asked.clear()
    served.faults[WEIGHTS] = ["elsewhere", 1000, "elsewhere"]  # the second fault meets the other host
    lines += download(served, tmp_path / "b", send_token=True)
    mine = served.address.removeprefix("http://")
    assert served.faults[WEIGHTS] == []
    for host, _, headers in served.asked:
        assert (headers.get("Authorization") == f"Bearer {TOKEN}") == (host == mine)
    assert {host for host, _, _ in served.asked} == {mine, served.other.removeprefix("http://")}
    assert TOKEN not in " ".join(lines)
    assert TOKEN not in (tmp_path / "b" / manifest.NAME).read_text()


def test_the_tokens_cookie_of_modelscope_too(served, tmp_path, monkeypatch, other_is_public):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    served.faults[WEIGHTS] = ["elsewhere"]
    download(served, tmp_path / "m", source="modelscope", send_token=True)
    other = served.other.removeprefix("http://")
    assert other in {host for host, _, _ in served.asked}
    for host, _, headers in served.asked:
        assert (TOKEN in str(headers)) == (host != other)


def test_modelscope(served, tmp_path):
    """A stand-in has the interface that ModelScope's own client uses; a moved branch is reported here too."""
    download(served, tmp_path / "m", source="modelscope")
    stored = json.loads((tmp_path / "m" / manifest.NAME).read_text())
    assert stored["source"] == "modelscope"
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == model_files()[WEIGHTS]
    assert "holds" in refused(served, tmp_path / "m", USAGE)  # the hub's model of that name is another one
    served.branch = bad_hub.commit(2)
    served.commits[served.branch] = model_files(seed=1)
    assert "has moved" in " ".join(download(served, tmp_path / "m", source="modelscope"))


def test_modelscope_has_no_way_back(served, tmp_path):
    """Our name of a version is not ModelScope's, so an incomplete folder can only be updated."""
    download(served, tmp_path / "m", source="modelscope")
    served.branch = bad_hub.commit(2)
    served.commits[served.branch] = model_files(seed=1)
    assert "--revision" not in " ".join(download(served, tmp_path / "m", source="modelscope"))
    (tmp_path / "m" / WEIGHTS).unlink()
    assert "--update true" in refused(served, tmp_path / "m", USAGE, source="modelscope")
    download(served, tmp_path / "m", source="modelscope", update=True)
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == model_files(seed=1)[WEIGHTS]


def test_pickles_need_a_word(tmp_path):
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    with bad_hub.serving(bad_hub.hub_of(files)) as served:
        assert "--pickles true" in refused(served, tmp_path / "m", UNSAFE)
        assert inside(tmp_path / "m") == []
        download(served, tmp_path / "m", pickles=True)
        assert inside(tmp_path / "m") == sorted([*files, manifest.NAME])


def test_asked_to_wait(served, tmp_path, monkeypatch):
    """Retry-After is obeyed up to a limit; beyond it the error comes at once."""
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    served.faults[WEIGHTS] = [(429, {"Retry-After": "7"})]
    download(served, tmp_path / "a")
    assert waits == [7.0]
    served.faults[WEIGHTS] = [(429, {"Retry-After": "9999"})]
    assert "9999 s" in refused(served, tmp_path / "b", USAGE)
    assert waits == [7.0]
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    served.faults["list"] = [(429, {"Retry-After": soon})]
    download(served, tmp_path / "c")
    assert 90 < waits[1] <= 100


def test_the_disk_is_checked_first(served, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr(destination, "SPARE", (1 << 20) - 200_000)
    refused(served, tmp_path / "m", DISK)
    assert inside(tmp_path / "m") == []
    assert not served.files("/resolve/")


@pytest.mark.parametrize(
    "listing",
    [b"not json", b"[]", b"{}", b'{"sha": "x", "siblings": []}', b'{"sha": 5, "siblings": 7}'],
)
def test_a_hub_that_talks_nonsense(served, tmp_path, listing):
    """There is one clear error and no traceback."""
    for source in ("hub", "modelscope"):
        served.faults["list"] = [(200, {}, None, listing)]
        refused(served, tmp_path / "m", USAGE, source=source)
    assert inside(tmp_path / "m") == []


def test_unknown_names(served, tmp_path):
    assert "404" in refused(served, tmp_path / "m", USAGE, model_path="some/nothing")
    assert "404" in refused(served, tmp_path / "m", USAGE, revision="nothing")
    refused(served, tmp_path / "m", USAGE, model_path="no-owner/../x")
    refused(served, None, USAGE, model_path="a/b/c")
    assert not (tmp_path / "m").exists()


def list_file(served: bad_hub.Hub, tmp_path: Path, size: str, shards: int) -> dict[str, bytes]:
    """Put a folder of the original LLaMA format on the server, with its MD5 lists."""
    names = [f"consolidated.{number:02}.pth" for number in range(shards)]
    files = {f"{size}/{name}": content(50_000, seed) for seed, name in enumerate(names)}
    files[f"{size}/params.json"] = b'{"dim": 64}'
    sums = {name.partition("/")[2]: hashlib.md5(data).hexdigest() for name, data in files.items()}
    files[f"{size}/checklist.chk"] = "".join(f"{s}  {n}\n" for n, s in sums.items()).encode()
    files["tokenizer.model"] = b"pieces"
    tokenizer = hashlib.md5(b"pieces").hexdigest()
    files["tokenizer_checklist.chk"] = f"{tokenizer}  tokenizer.model\n".encode()
    served.commits[served.branch] = files
    return {name.removeprefix(f"{size}/"): data for name, data in files.items()}


def llama(served: bad_hub.Hub, size: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", "tools/download_llama.sh", size, str(folder)]
    variables = {**os.environ, "PYTHON": sys.executable, "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("size", "shards"), [("7B", 1), ("13B", 2)])
def test_llama_folders(served, tmp_path, size, shards):
    """Files of one size and the tokenizer match their MD5 lists; the address is not stored."""
    files = list_file(served, tmp_path, size, shards)
    address = f"{served.address}/plain/*?Signature=secret"
    process = llama(served, size, tmp_path / "m", PRESIGNED_URL=address)
    assert process.returncode == 0, process.stderr
    assert inside(tmp_path / "m") == sorted([*files, manifest.NAME])
    assert all((tmp_path / "m" / name).read_bytes() == data for name, data in files.items())
    output = (tmp_path / "m" / manifest.NAME).read_text() + process.stdout + process.stderr
    assert "secret" not in output
    served.lies[f"{size}/consolidated.00.pth"] = bytes(50_000)
    process = llama(served, size, tmp_path / "n", BASE_URL=f"{served.address}/plain/")
    assert process.returncode == CHECKPOINT
    assert not list((tmp_path / "n").glob("*.pth"))
    assert "in two attempts" in process.stderr


def test_llama_without_an_address(served, tmp_path):
    """No address is built in, and the error says what is wrong."""
    for size, environment, word in (
        ("7B", {}, "PRESIGNED_URL"),
        ("8B", {}, "7B|13B|30B|65B"),
        ("7B", {"PRESIGNED_URL": "https://x/y"}, "no *"),
    ):
        process = llama(served, size, tmp_path / "m", **environment)
        assert process.returncode == USAGE
        assert word in process.stderr
    assert "http" not in (ROOT / "tools/download_llama.sh").read_text().split("set -e")[1]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{a}/plain/config.json", USAGE),  # no checksum
        ("ftp://x/y " + "0" * 64, USAGE),
        ("{a}/plain/config.json x y z", USAGE),
        ("{a}/plain/config.json ../x " + "0" * 64, UNSAFE),
        ("{a}/plain/config.json x " + "0" * 64, CHECKPOINT),
    ],
)
def test_bad_lists(served, tmp_path, line, code):
    with pytest.raises(UserError) as caught:
        fetch_list(tmp_path, [line.replace("{a}", served.address)])
    assert caught.value.code == code
    assert inside(tmp_path / "m") == []


def test_a_list_from_stdin(served, tmp_path, monkeypatch):
    digest = hashlib.sha256(model_files()[WEIGHTS]).hexdigest()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{served.address}/plain/{WEIGHTS} {WEIGHTS} {digest}\n"))
    hub_download.run(DownloadConfig(url_list="-", to=str(tmp_path / "m")))
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == model_files()[WEIGHTS]


def test_a_list_from_stdin_in_another_encoding(tmp_path, monkeypatch):
    """Its bytes are no text, as in a file; what they would have said is not guessed."""
    stdin = io.TextIOWrapper(io.BytesIO("模型\n".encode("gbk")), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(UserError, match="--url_list -: cannot be read"):
        hub_download.run(DownloadConfig(url_list="-", to=str(tmp_path / "m")))
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "no text"])
def test_a_list_that_cannot_be_read(tmp_path, content):
    """It is refused before its folder is made."""
    path = tmp_path / "list.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"--url_list .*list\.txt: cannot be read") as caught:
        hub_download.run(DownloadConfig(url_list=str(path), to=str(tmp_path / "m")))
    assert caught.value.code == USAGE
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("lines", [[], ["# nothing", ""]], ids=["empty", "comments"])
def test_a_list_without_files(tmp_path, lines):
    """The error says what a line looks like, and nothing of missing checksums."""
    with pytest.raises(UserError) as caught:
        fetch_list(tmp_path, lines)
    assert (caught.value.code, caught.value.problem) == (
        USAGE,
        f"{tmp_path / 'list.txt'}: the list names no file.",
    )
    assert "URL [NAME] [CHECKSUM]" in caught.value.fix


OF_HUBS = {
    "source": "modelscope",
    "revision": "v1",
    "endpoint": "https://x",
    "send_token": True,
    "files": "*.json",
    "pickles": True,
}


@pytest.mark.parametrize(
    ("given", "idle"),
    [
        ({"url_list": "list.txt", "to": "m", **OF_HUBS}, [*OF_HUBS]),
        ({"url_list": "list.txt", "to": "m", "files": "*.json"}, ["files"]),
        ({"model_path": "demo", "update": True, **OF_HUBS}, [*OF_HUBS, "update"]),
        ({"model_path": "demo", "to": "m", "pickles": True, "verify": True}, ["pickles"]),
        ({"model_path": "demo", "verify": True}, ["verify"]),
    ],
)
def test_options_that_do_nothing_are_refused(tmp_path, monkeypatch, given, idle):
    """A list and the demo have no versions, mirrors or patterns; nothing is requested or written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        hub_download.run(DownloadConfig(**given))
    assert caught.value.code == USAGE
    assert sorted(re.findall(r"--(\w+) is", str(caught.value))) == sorted(idle)
    assert inside(tmp_path) == []


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/download.py", *arguments]
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_offline(served, tmp_path):
    """If the files were fetched, the folder serves and names its commit; else exit 2, nothing left (X14)."""
    cold = program(NAME, HF_HUB_OFFLINE="1")
    assert cold.returncode == USAGE
    assert "HF_HUB_OFFLINE" in cold.stderr
    refused_line = program(NAME, "--endpoint", "http://127.0.0.1:9")
    assert refused_line.returncode == USAGE
    assert "cannot be reached" in refused_line.stderr
    assert inside(tmp_path / "cache") == []
    warm = program(NAME, "--endpoint", served.address)
    assert warm.returncode == 0, warm.stderr
    assert locate.locate(NAME) == str(manifest.place(NAME))
    for flags in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = program(NAME, **flags)
        assert again.returncode == 0, again.stderr
        assert served.branch in again.stdout


def test_nothing_else_is_asked(served, tmp_path):
    """Only the list and the files are requested: no telemetry, no other host (S14)."""
    process = program(NAME, "--to", str(tmp_path / "m"), "--endpoint", served.address)
    assert process.returncode == 0, process.stderr
    paths = {path for _, path, _ in served.asked}
    base = f"/{NAME}/resolve/{served.branch}"
    assert paths == {f"/api/models/{NAME}/revision/main", f"{base}/config.json", f"{base}/{WEIGHTS}"}


def test_ctrl_c(served, tmp_path):
    """Only .part files are left, and the same command continues them."""
    served.commits[served.branch][WEIGHTS] = data = content(3_000_000)
    served.faults[WEIGHTS] = [1_000_000] + [(503, {"Retry-After": "60"})] * 9
    command = [sys.executable, "tools/download.py", NAME, "--to", str(tmp_path / "m")]
    command += ["--endpoint", served.address]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    reset_signal = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 (a background job ignores it)
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, preexec_fn=reset_signal
    ) as process:
        for line in process.stderr:
            if b"again in 60 s" in line:
                break
        process.send_signal(signal.SIGINT)
        assert b"Ctrl-C" in process.stderr.read()
        assert process.wait(20) == 130
    assert {path.suffix for path in (tmp_path / "m").iterdir()} == {".part"}
    served.faults.clear()
    served.asked.clear()
    download(served, tmp_path / "m")
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == data
    assert served.files(WEIGHTS)[0][2]["Range"] == "bytes=1000000-"


def test_two_at_a_time(served, tmp_path):
    (tmp_path / "m").mkdir()
    with lock.owned(tmp_path / "m"):
        assert "another download" in refused(served, tmp_path / "m", USAGE)


def test_the_demo(tmp_path, tiny_model, monkeypatch, capsys):
    """It is copied with its checksums; a second time copies nothing, and a changed file is an error."""
    options = DownloadConfig(model_path="demo", to=str(tmp_path / "m"))
    monkeypatch.setattr(locate, "locate", {"demo": str(tiny_model)}.__getitem__)
    hub_download.run(options)
    names = [path.name for path in tiny_model.iterdir()]
    assert inside(tmp_path / "m") == sorted([*names, manifest.NAME])
    assert all((tmp_path / "m" / name).read_bytes() == (tiny_model / name).read_bytes() for name in names)
    assert " 0 there already" in capsys.readouterr().out
    hub_download.run(options)
    assert "0 files copied" in capsys.readouterr().out
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        hub_download.run(options)


def test_the_demo_is_read_again_on_request(tmp_path, tiny_model, monkeypatch):
    options = DownloadConfig(model_path="demo", to=str(tmp_path / "m"))
    monkeypatch.setattr(locate, "locate", lambda _: str(tiny_model))
    hub_download.run(options)
    plain, again = hashing.of_file, []
    monkeypatch.setattr(hashing, "of_file", lambda path, full=False: again.append(full) or plain(path, full))
    for verify in (False, True):
        again.clear()
        hub_download.run(dataclasses.replace(options, verify=verify))
        assert set(again) == {verify}


def test_command_line():
    """The name may stand without a flag, before or after options."""
    for words in (["demo"], ["--model_path", "demo"], ["--verify", "true", "demo"], ["demo", "--verify"]):
        assert program(*words, "--url_list", "x").returncode == USAGE
    process = program("--to", "x", "--nothing")
    assert (process.returncode, "--nothing" in process.stderr) == (USAGE, True)


# What no folder may do, whether it was downloaded or not.


def poisoned(tiny_model: Path, folder: Path, kind: str) -> Path:
    """Make the tiny model a stranger's of another type, whose code writes a canary when it is imported."""
    shutil.copytree(tiny_model, folder)
    canary = f"open({str(folder.parent / 'canary')!r}, 'w').write('ran')\n"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "tokenizer"):
        (folder / f"{name}.py").write_text(canary + "class X:\n    pass\n")
    path = folder / ("tokenizer_config.json" if kind == "tokenizer" else "config.json")
    values = json.loads(path.read_text())
    if kind == "tokenizer":
        values |= {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "tokenizer_class": "X"}
    else:
        classes = {"AutoConfig": "configuration_x.X", "AutoModelForCausalLM": "modeling_x.X"}
        values |= {"auto_map": classes, "model_type": "llama" if kind == "known" else "strange"}
    path.write_text(json.dumps(values))
    return folder


def test_code_of_a_model_is_never_run(tiny_model, tmp_path, monkeypatch):
    """It is refused with exit 8, and nobody is asked whether it may run (S6)."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = poisoned(tiny_model, tmp_path / "m", "strange")
    with pytest.raises(UserError, match=r"configuration_x\.X.*--remote_code COMMIT") as caught:
        base_model.load_config(str(folder))
    assert caught.value.code == UNSAFE
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("kind", ["strange", "tokenizer", "known"])
def test_code_is_not_imported(tiny_model, tmp_path, kind, monkeypatch):
    """No code is imported, whatever is loaded; a model of a known type works without its code (S6)."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = str(poisoned(tiny_model, tmp_path / "m", kind))
    worked = 0
    for work in (
        lambda: models_tokenizer.load_tokenizer(folder),
        lambda: base_model.load_config(folder),
        lambda: base_model.skeleton(folder, base_model.load_config(folder)),
        lambda: base_model.load_base(folder, 16, "fp32", "cpu"),
    ):
        with contextlib.suppress(UserError):
            work()
            worked += 1
    assert not (tmp_path / "canary").exists()
    assert worked == 4 or kind != "known"


@pytest.mark.parametrize(
    "base",
    ["https://evil.example/model", "../outside", "a/../../outside", "evil/model", "file:///etc", "/gone"],
)
def test_what_an_adapter_names_is_not_followed(tmp_path, base, monkeypatch):
    """The error shows the name for the user to type; an adapter's record fetches nothing (S11)."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "in" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in")
    adapter = runs_adapters.Adapter("adapter", tmp_path / "in" / "a", base=base)
    monkeypatch.setattr(runs_adapters, "find", lambda *_: adapter)
    located: list[str] = []
    monkeypatch.setattr(locate, "locate", lambda name: located.append(name) or name)
    with pytest.raises(UserError, match="not on this machine") as caught:
        loader.prepare(ChatConfig(lora_path="a"))
    assert base in str(caught.value)
    assert located == []
    listed, find = runs_adapters.read_list("a"), lambda name: (locate.locate(name), None)
    typed = ModelRequest(base, listed, resolve.TRANSFORMERS, find, gguf_remedy="", code_remedy="")
    assert resolve.resolve(typed).base == base  # typed by the user
    assert located == [base]


def test_a_base_that_is_here_is_followed(served, tmp_path, tiny_model):
    """This is the demo, a folder, or what was fetched before."""
    assert not base_choice.is_here(NAME)
    download(served, None)
    for base in ("demo", str(tiny_model), NAME):
        assert base_choice.is_here(base)
    assert locate.here(NAME) == str(manifest.place(NAME))
