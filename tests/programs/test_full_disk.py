"""A disk that becomes full while a program writes: one clear message, nothing lost, and the program goes on.

Each child has a real full disk (tests/support/small_disk.py), and the look at its free space that programs
take before they write does not help: another program may fill the disk later.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecard.errors import DISK, USAGE
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from tests.support import small_disk, written_files
from tests.support.small_disk import BALLAST, PAGE
from tests.support.written_files import NEW, OLDER, WRITERS, Inputs

TEMPORARY = re.compile(r"\.tmp$|\.tmp\.png$|\.making$|^\.saving-|^\.onecard-|^\.\d+\.|^\.lock$")
# files with times, paths, seconds, a port or a random id, which differ from run to run
VOLATILE = re.compile(
    r"(finished|progress|manifest|export|onecard|onecard_download|finetune_config|fingerprints|wandb_run)\.json$"
    r"|log(\.dropped)?\.jsonl$|loss\.png$|chat\.jsonl$|\.console-"
)
QUICK = [("train", 0.2), ("train", 0.6), ("train", 0.9)]
OTHERS = [name for name in WRITERS if name not in written_files.TRAININGS]  # one training stands for all
QUICK += [(name, 0.5) for name in OTHERS]
FINE = [("train", number / 16) for number in range(16)]
FINE += [(name, share) for name in OTHERS for share in (0, 0.25, 0.75, 0.95)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model, one_thread) -> Iterator[Inputs]:
    with pytest.MonkeyPatch.context() as patch:
        yield written_files.inputs(tmp_path_factory.mktemp("inputs"), tiny_model, patch)


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory) -> Callable[[str], dict[str, bytes]]:
    """What a program writes where there is room, by the names below place/new."""

    @functools.cache
    def run(name: str) -> dict[str, bytes]:
        place = tmp_path_factory.mktemp("reference")
        WRITERS[name].run(inputs, written_files.prepare(name, place, inputs))
        return contents(place / NEW)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def on_a_full_disk(name: str, free: int, size: int, inputs: Inputs, place: Path, out: Path) -> None:
    """In a child: run a program on a disk with `free` bytes, and once more when there is room again.

    What each of the two leaves is copied to `out`, with its exit code and what it said.
    """
    small_disk.mount(place, size)
    new = written_files.prepare(name, place, inputs)
    small_disk.fill(place, free)
    codes = [small_disk.program(lambda: WRITERS[name].run(inputs, new), out / "first.txt")]
    shutil.copytree(place, out / "first", ignore=shutil.ignore_patterns(BALLAST))
    (place / BALLAST).unlink()
    codes.append(small_disk.program(lambda: written_files.go_on(name, inputs, new), out / "second.txt"))
    shutil.copytree(place, out / "second")
    (out / "codes.json").write_text(json.dumps(codes))


@pytest.mark.parametrize(
    ("name", "share"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.ci) for case in FINE)],
    ids=lambda value: value if isinstance(value, str) else f"{value:.0%}",
)
def test_a_full_disk_loses_nothing(name, share, inputs, reference, tmp_path):
    """C4, C6, X4: with room for a share of the output, and for the whole of it after that."""
    expected = reference(name)
    pages = sum(-(-len(content) // PAGE) for content in expected.values())
    place, out = tmp_path / "disk", tmp_path / "out"
    place.mkdir()
    out.mkdir()
    free = max(0, int(pages * share) - len(WRITERS[name].older))  # an older file makes room when it goes
    sizes = free * PAGE, (4 * pages + 256) * PAGE
    ended = small_disk.in_child(lambda: on_a_full_disk(name, *sizes, inputs, place, out), out / "all.txt")
    if ended and small_disk.NoMountError.__name__ in (out / "all.txt").read_text():
        pytest.skip("no mounts of one's own here")
    assert ended == 0, (out / "all.txt").read_text()
    first, second = json.loads((out / "codes.json").read_text())
    said = (out / "first.txt").read_text()
    assert first == (USAGE if name == "save a chat" else DISK), said  # the chat goes on after a message
    assert "Traceback" not in said
    [message] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert str(place) in message, message
    left = contents(out / "first")
    assert [file for file in left if any(map(TEMPORARY.search, file.split("/")))] == []
    assert [
        file for file in WRITERS[name].older if left[f"{NEW}/{file}"] not in (OLDER, expected[file])
    ] == []
    check_unfinished(name, out / "first" / NEW)
    assert second == 0, (out / "second.txt").read_text()
    whole = contents(out / "second" / NEW)
    assert whole.keys() - expected.keys() <= {f"runs/first/{runs_folder.DROPPED}"}
    assert expected.keys() <= whole.keys()
    assert [file for file in expected if whole[file] != expected[file] and not VOLATILE.search(file)] == []


def check_unfinished(name: str, new: Path) -> None:
    """A folder that appears whole is not there; a run has whole checkpoints only."""
    for folder, marker in WRITERS[name].folders.items():
        assert not (new / folder / (marker or "")).exists()
        if name == "train" and runs_folder.checkpoint_steps(new / folder):
            newest, problems = runs_checkpoint.newest(new / folder)
            assert (newest is not None, problems) == (True, [])
