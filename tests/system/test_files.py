"""The user's cache folder is where it has always been on Linux, and an existing one is not abandoned."""

from pathlib import Path

import platformdirs
import pytest

from onecard.system import files as system_files


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("ONECARD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_cache_is_where_it_was(home, monkeypatch):
    assert system_files.cache_folder() == home / ".cache" / "onecard"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    assert system_files.cache_folder() == home / "xdg" / "onecard"
    monkeypatch.setenv("ONECARD_CACHE", str(home / "own"))
    assert system_files.cache_folder() == home / "own"
    assert list(home.iterdir()) == [], "to ask creates nothing"


def test_an_older_cache_of_another_system_is_kept(home, monkeypatch):
    """macOS and Windows have another place, but files in ~/.cache were downloaded already."""
    new, old = home / "Library" / "Caches" / "onecard", home / ".cache" / "onecard"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: new)
    assert system_files.cache_folder() == new
    old.mkdir(parents=True)
    assert system_files.cache_folder() == old
    new.mkdir(parents=True)
    assert system_files.cache_folder() == new
