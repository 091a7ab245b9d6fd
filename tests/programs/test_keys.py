"""The command for keys: each key is shown once, and what it prints says what to do next."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.errors import UserError
from onecard.programs import keys as program
from onecard.serving import store as serving_store
from onecard.serving.keys import Key, Refusal
from onecard.system import files as system_files
from tests.support.paths import ROOT

SECRET = re.compile(r"oc-[\w-]{43}")


@pytest.fixture
def command(tmp_path, capsys):
    """A function that runs the command in a data folder and returns what it prints."""

    def run(*words: str) -> str:
        program.main([*words, "--data_dir", str(tmp_path / "data")])
        return capsys.readouterr().out

    return run


def found(folder: Path, secret: str) -> Key | Refusal:
    with serving_store.opened(folder / "data") as store:
        return store.keys.find(secret)


def test_a_life_of_a_key(command, tmp_path):
    """A2: the text is the last line of create and rotate, and nowhere else."""
    output = command("create", "alice", "--expires", "30d", "--scopes", "chat,jobs", "--owner", "team")
    first = output.splitlines()[-1]
    assert SECRET.findall(output) == [first]
    key = found(tmp_path, first)
    assert (key.owner, key.scopes) == ("team", {"chat", "jobs"})
    second = command("rotate", "alice").splitlines()[-1]
    assert found(tmp_path, first) is Refusal.UNKNOWN
    assert found(tmp_path, second) == key
    listed = command("list")
    assert re.search(rf"^alice +{key.id} +{second[:8]} +team +chat,jobs +600 .* valid$", listed, re.MULTILINE)
    assert "The next request with it is refused" in command("revoke", key.id)
    assert found(tmp_path, second) is Refusal.REVOKED
    assert re.search(r"^alice .* revoked 20\d\d-\d\d-\d\d \d\d:\d\d UTC$", command(), re.MULTILINE)
    assert not SECRET.search(listed + command())


def test_an_empty_list(command):
    assert command("list") == "There are no keys.\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["create"], "no key is named"),
        (["create", "a", "--expires", "tomorrow"], "must be a number and m, h, d or w"),
        (["create", "a", "--expires", "0d"], "must be a number"),
        (["create", "a", "--expires", "3651d"], "at most 3650d"),
        (["create", "a", "--scopes", "chat,everything"], "not 'everything'"),
        (["create", "a", "--scopes", ""], "has to name some of"),
        (["create", "a", "--requests_per_minute", "0"], "must be 1 or more"),
        (["create", "a\x1b[2J"], r"'a\\x1b\[2J' cannot be used"),
        (["revoke", "nobody"], "no valid key with the name 'nobody'"),
        (["revoke", "a", "--expires", "1d"], "--expires is for create and rotate"),
        (["list", "a"], "--name is not for list"),
        (["delete", "a"], "choose from create, list, revoke, rotate"),
    ],
)
def test_mistakes_are_named(command, words, problem):
    """A14: also those that would draw on the terminal."""
    with pytest.raises(UserError, match=problem) as error:
        command(*words)
    assert "\x1b" not in str(error.value)


def test_the_data_folder_does_not_depend_on_the_current_one(monkeypatch, tmp_path, capsys):
    """So the service and this command see the same keys, from wherever they are started."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    program.main(["create", "alice"])
    assert system_files.data_folder() == tmp_path / "onecard/serve"
    assert (tmp_path / "onecard/serve/onecard.db").is_file()


@pytest.mark.parametrize("words", [["-m", "serve.keys"], ["serve/keys.py"], ["-m", "onecard", "keys"]])
def test_it_is_called_in_three_ways(words, tmp_path):
    line = [sys.executable, *words, "list", "--data_dir", str(tmp_path / "data")]
    ended = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "There are no keys.\n"), ended.stderr
