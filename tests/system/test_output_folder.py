"""Where a new folder may be made: links are followed, and what a rename cannot replace is refused at once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.errors import CHECKPOINT, DISK, USAGE
from onecard.system import lock, output_folder
from tests.support.output_folders import FLAG, MADE_OF, make, refused
from tests.support.paths import ROOT


def test_links_lead_where_they_point(tmp_path):
    """The target of the link is empty or missing: the files are written there, and it stays a link."""
    (tmp_path / "disk/empty").mkdir(parents=True)
    for name in ("empty", "new"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "disk" / name)
        make(link)
        assert link.is_symlink()
        assert (tmp_path / "disk" / name / "model.safetensors").is_file()
        assert output_folder.is_made(link, MADE_OF, FLAG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "empty", "new"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    refused(tmp_path / "one", USAGE, "link")


def test_room_is_measured_where_the_link_points(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/new")
    paths, real = [], shutil.disk_usage
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: (paths.append(path), real(path))[1])
    make(tmp_path / "link")
    assert [path.parent for path in paths] == [tmp_path / "disk"]


@pytest.mark.parametrize("name", [".", "../here", "link"])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, name):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    refused(Path(name), USAGE, "the current folder", "inside it")


def test_a_mount_point_is_refused(tmp_path):
    """This holds for another file system and for the same one; a folder inside it is made."""
    for place in ("/", "/proc"):
        refused(Path(place), USAGE, "a mount point", "inside it")
    (tmp_path / "of it").mkdir()
    program = (
        "import sys; from pathlib import Path; from tests.support.output_folders import make, refused\n"
        "refused(Path(sys.argv[1]), 2, 'a mount point', 'inside it')\n"
        "make(Path(sys.argv[1]) / 'made')\n"
    )
    command = ["unshare", "-rm", "sh", "-c", 'mount --bind "$3" "$3" && exec "$1" -c "$2" "$3"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*command[:2], "true"], check=False).returncode:
        pytest.skip("no mounts of one's own here")
    ended = subprocess.run(
        [*command, sys.executable, program, str(tmp_path / "of it")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_a_folder_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file/x", tmp_path / "file/x/y"):
        refused(target, USAGE, f"{tmp_path / 'file'} is a file")


def test_a_parent_that_cannot_be_made(tmp_path):
    """Its name is too long: exit code 7 with the option."""
    refused(tmp_path / ("x" * 300) / "made", DISK, "too long")


def test_a_file_that_changed_is_named(tmp_path):
    """So are a file of the same size, a missing one and a new one.

    A copy with its times is the same folder.
    """
    make(tmp_path / "made")
    before = output_folder.RECORD, (tmp_path / "made" / output_folder.RECORD).read_bytes()
    subprocess.run(["cp", "-a", tmp_path / "made", tmp_path / "copy"], check=True)
    assert output_folder.is_made(tmp_path / "copy", MADE_OF, FLAG)
    (tmp_path / "made/model.safetensors").write_bytes(b"1" * 64)
    refused(tmp_path / "made", CHECKPOINT, "model.safetensors", "new folder")
    (tmp_path / "copy/config.json").unlink()
    (tmp_path / "copy/notes.txt").write_text("mine")
    refused(tmp_path / "copy", CHECKPOINT, "config.json, notes.txt")
    assert (tmp_path / "made" / before[0]).read_bytes() == before[1]


def test_a_folder_of_something_else_is_refused(tmp_path):
    make(tmp_path / "made")
    record = tmp_path / "made" / output_folder.RECORD
    values = json.loads(record.read_text())
    for other in ({**values, "program": "other"}, {**values, "files": 3}, []):
        record.write_text(json.dumps(other))
        refused(tmp_path / "made", USAGE, "is there already")


def test_what_a_killed_conversion_of_an_older_version_left_is_deleted(tmp_path):
    """An older version that still converts there holds a lock on the parent folder, and keeps its folder."""
    leftover = tmp_path / ".onecard-gguf-abc"
    leftover.mkdir()
    (leftover / "model.gguf").write_bytes(b"GGUF")
    parent = os.open(tmp_path, os.O_RDONLY)
    try:
        assert lock.take(parent)
        with output_folder.converting(tmp_path / "model.gguf", tmp_path):
            assert leftover.exists()
    finally:
        os.close(parent)
    with output_folder.converting(tmp_path / "model.gguf", tmp_path):
        assert not leftover.exists()
