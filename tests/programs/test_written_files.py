"""Everything that the programs write survives a power failure, and has the rights that the umask says.

The model of the disk and its states are those of tests/support/power_failure.py. A program that has ended
well has its whole output on the disk; while it runs, the older output or the whole new one is there, and
never a part that is taken for the whole.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onecard.__main__ import PROGRAMS
from onecard.runs import checkpoint as runs_checkpoint
from onecard.runs import folder as runs_folder
from tests.support import written_files
from tests.support.power_failure import Disk
from tests.support.written_files import OLDER, WRITERS, Inputs

# files and folders that the next run deletes or replaces, and that nothing reads
LEFTOVER = re.compile(r"^\.lock$|\.making$|\.part$|\.tmp(\.png)?$|^\.saving-|^\.replaced-|^\.\d+\.rows")
CACHE = "cache"  # what is lost there is made again
PRIVATE = ("cache/rows/",)  # only their owner may look inside, whatever the umask says (docs/safety.md)
State = dict[str, bytes]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tiny_model, one_thread) -> Iterator[Inputs]:
    with pytest.MonkeyPatch.context() as patch:
        yield written_files.inputs(tmp_path_factory.mktemp("inputs"), tiny_model, patch)


@contextlib.contextmanager
def masked(umask: int) -> Iterator[None]:
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


@dataclasses.dataclass
class Recording:
    """A program's file operations under the umask 022, and its place with what it wrote."""

    place: Path
    before: dict[Path, bytes | None]
    disk: Disk


@pytest.fixture(scope="module")
def record(inputs, tmp_path_factory) -> Callable[[str], Recording]:
    """The recording of a program; each is run once."""

    @functools.cache
    def run(name: str) -> Recording:
        place = tmp_path_factory.mktemp("recorded")
        with masked(0o022), pytest.MonkeyPatch.context() as patch:
            new = written_files.prepare(name, place, inputs)
            recording = Recording(place, Disk.tree(place), Disk(place, patch))
            WRITERS[name].run(inputs, new)
            recording.disk.notice()
        return recording

    return run


def files(state: dict[Path, bytes | None], place: Path) -> State:
    """The files below place/new that can be reached, by name, without leftovers."""
    result = {}
    for path, content in state.items():
        name, folders = described(path, place / written_files.NEW)
        if content is not None and name and all(state.get(folder, b"") is None for folder in folders):
            result[name] = content
    return result


@functools.cache
def described(path: Path, new: Path) -> tuple[str, list[Path]]:
    """(The name of a path below `new`, '' elsewhere and of a leftover; its folders from `new` on)."""
    if not path.is_relative_to(new) or any(LEFTOVER.search(part) for part in path.parts):
        return "", []
    folders = [folder for folder in path.parents if folder.is_relative_to(new)]
    return path.relative_to(new).as_posix(), folders


def taken_for_whole(name: str, state: State, final: State) -> dict[str, tuple[bytes | None, bytes | None]]:
    """The files, with the content in this state and at the end, that differ although they count as whole."""
    writer, inside = WRITERS[name], set()
    wrong = {}
    for folder, marker in writer.folders.items():
        names = {file for file in {*state, *final} if file.startswith(f"{folder}/")}
        inside |= names
        if f"{folder}/{marker}" in state if marker else names & state.keys():
            wrong |= {file: (state.get(file), final.get(file)) for file in names}
    for file in state.keys() - inside:
        if file.endswith(writer.lines or "/"):
            whole_lines = state[file][: state[file].rfind(b"\n") + 1]
            is_right = final[file].startswith(whole_lines) or not whole_lines.strip(b"\0")
            wrong |= {} if is_right else {file: (state[file], final[file])}
        elif not (file in writer.older and state[file] == OLDER) and "fingerprints.json" not in file:
            wrong[file] = (state[file], final.get(file))  # the reader of fingerprints.json checks it
    return {file: pair for file, pair in wrong.items() if pair[0] != pair[1]}


def ahead_of_the_log(state: State) -> list[str]:
    """The whole checkpoints of a run with a step that its log lacks."""
    result = []
    for file, content in state.items():
        folder, _, name = file.rpartition("/")
        if name != runs_checkpoint.MANIFEST or not is_whole(state, folder, content):
            continue
        run, _, last = folder.rpartition("/checkpoint-")
        if runs_folder.ASIDE in run:  # set aside, so no program goes on with it
            continue
        lines = state.get(f"{run}/{runs_folder.LOG}", b"").split(b"\n")[:-1]
        steps = {json.loads(line)["step"] for line in lines if b'"loss"' in line}
        result += [] if steps >= set(range(1, int(last) + 1)) else [folder]
    return result


def is_whole(state: State, folder: str, manifest: bytes) -> bool:
    """Whether the checkpoint has what its manifest lists."""
    try:
        listed = json.loads(manifest)["files"]
    except ValueError:
        return False
    contents = {file: state.get(f"{folder}/{file}", b"") for file in listed}
    return all(hashlib.sha256(contents[file]).hexdigest() == listed[file]["sha256"] for file in listed)


def test_every_program_and_every_writer_is_here():
    """A new program has to say what it writes, and a writer which programs have it."""
    assert written_files.PROGRAMS.keys() == PROGRAMS.keys()
    assert {name for names in written_files.PROGRAMS.values() for name in names} == WRITERS.keys()


@pytest.mark.parametrize("name", WRITERS)
def test_every_output_is_whole_after_a_power_failure(name, record):
    """C3 for every program: no state has a part that is taken for the whole, or loses what was said done."""
    recording = record(name)
    place, disk = recording.place, recording.disk
    final = files(Disk.tree(place), place)
    assert final
    checked: set[frozenset] = set()
    for length, state in disk.fewer_states(recording.before):
        here = files(state, place)
        if length == len(disk.log):
            lost = [file for file in final if here.get(file) != final[file]]
            assert [file for file in lost if CACHE not in file] == [], "lost after the end"
        key = frozenset(here.items())
        if key not in checked:
            checked.add(key)
            wrong = taken_for_whole(name, here, final)
            assert not wrong, (length, disk.log[length - 1][:2], wrong)
            assert not ahead_of_the_log(here), (length, disk.log[length - 1][:2])
    assert len(checked) >= 2


def other_rights(place: Path, umask: int) -> dict[Path, str]:
    """The files and folders below a place whose rights are not those that the umask leaves."""
    paths = [path for path in place.rglob("*") if not str(path.relative_to(place)).startswith(PRIVATE)]
    assert paths
    rights = {path: path.stat().st_mode & 0o777 for path in paths}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in paths}
    return {path: f"{rights[path]:03o}" for path in paths if rights[path] != expected[path]}


@pytest.mark.parametrize("name", WRITERS)
def test_every_output_has_the_usual_rights(name, record):
    """Other users may read what is written under the umask 022, checkpoints too."""
    assert other_rights(record(name).place, 0o022) == {}


@pytest.mark.parametrize(
    "umask", [0o077, pytest.param(0o002, marks=pytest.mark.ci)], ids=lambda umask: f"{umask:03o}"
)
@pytest.mark.parametrize("name", WRITERS)
def test_every_output_follows_the_umask(name, umask, inputs, tmp_path, monkeypatch):
    """So does what a program keeps in the cache: the rights are neither wider nor narrower."""
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    with masked(umask):
        WRITERS[name].run(inputs, written_files.prepare(name, tmp_path, inputs))
    assert other_rights(tmp_path, umask) == {}
