"""Python code that comes with a model: the user allows it, and transformers runs it from here alone.

Nothing runs unless the user typed its commit (--remote_code) and the folder holds that commit, unchanged. A
run or a checkpoint can store a commit, but that never allows code to run. This file knows no torch and no
options.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError

from onecard import errors
from onecard.errors import UNSAFE, UserError, first_line, is_out_of_memory
from onecard.hub import demo, manifest, model_files, revisions, transfer
from onecard.system import commands, hashing, lock
from onecard.system import files as system_files
from onecard.system.console import say

PRINT = "code of the base"  # the key of the commit among the fingerprints of a run
SETTINGS = "*config*.json"  # files from which transformers may read an auto_map
CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")  # module.Class, the module beside the settings
GENERATE = "custom_generate"  # transformers would run the code in a folder of this name too
KINDS = {40: transfer.GIT, 64: transfer.SHA256}  # length of a blob's name in the hub's cache: its checksum
READ_FIRST = "Read that code, then ask for it with --remote_code and that commit (llama.cpp runs none)."
FETCH = f"{commands.name('download')} OWNER/MODEL --remote_code COMMIT"
LOCK = "remote_code.lock"
SHOWN = 12  # names in a message
# how transformers words what it cannot do
NO_ROOM, NO_ATTENTION = "dispatched on the CPU", "does not support an attention implementation"
# errors that are not the fault of the code: damaged files, no memory, and what the caller tries otherwise
NOT_OF_CODE = (UserError, OSError, SafetensorError, json.JSONDecodeError)
OTHERWISE = (NO_ATTENTION, NO_ROOM)


@dataclasses.dataclass(frozen=True)
class TrustedCode:
    """Code of a folder at one commit, which the user allowed to run."""

    folder: Path
    commit: str

    def read(self, auto: Any, **settings: Any) -> Any:
        """from_pretrained of a transformers Auto class, on this folder and with its own code."""
        with self._alone():
            return auto.from_pretrained(
                str(self.folder), trust_remote_code=True, local_files_only=True, **settings
            )

    def build(self, auto: Any, config: Any, **settings: Any) -> Any:
        """from_config of a transformers Auto class: the model without weights, for a config of `read`."""
        config.name_or_path = str(self.folder)  # where transformers looks for the code
        with self._alone():
            return auto.from_config(config, trust_remote_code=True, **settings)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Verify the files again, and keep other processes from letting transformers copy them meanwhile."""
        waiting = "waiting for another program that loads a model with code of its own ..."
        with lock.held(system_files.cache_folder() / LOCK, lambda: say(waiting)):
            verified(self.folder, self.commit)
            try:
                yield
            except NOT_OF_CODE:
                raise
            except Exception as error:  # code can fail in any way
                if is_out_of_memory(error) or any(phrase in str(error) for phrase in OTHERWISE):
                    raise
                problem = f"--remote_code {self.commit}: the model's code fails"
                fix = "It may need other packages, or another version of transformers."
                raise UserError(f"{problem}: {type(error).__name__}: {first_line(error)}.", fix) from None


def verify_commit(path: str, commit: str | None) -> TrustedCode | None:
    """Verify that a model is at the commit whose code the user allowed, and say that the code will run.

    path: folder of the model, or its name in the hub's cache. Returns None when commit is None: the user
    allowed no code. Nothing runs yet. Raises UserError (exit 8) when the folder holds another commit or
    changed files.
    """
    if commit is None:
        return None
    folder = Path(path)
    if not folder.is_dir():
        folder = _in_cache(path, commit)
    files = listed(verified(folder, commit))
    say(f"code        of {path} now runs on this machine with your rights: {files}; commit {commit}")
    return TrustedCode(folder, commit)


def locate_with_code(name: str, commit: str | None) -> str | None:
    """Locate a name of the hub whose code the user allowed, for verify_commit.

    Returns the folder that tools/download.py made, or the bare name, whose commit verify_commit finds in the
    hub's cache. Returns None when the name has to be located like any other. Raises UserError when the name
    says another commit.
    """
    if commit is None or name == demo.DEMO or not revisions.is_name(name):
        return None
    repository, revision = revisions.split(name)
    if revision and revisions.COMMIT.fullmatch(revision) and revision != commit:
        problem = f"--model_path {name} and --remote_code {commit} name two commits."
        raise UserError(problem, "Name the commit whose code you read, once.")
    if revision and revision != commit:
        say(f"hub         {repository}: commit {commit} of --remote_code is used, wherever {revision} points")
    download = manifest.downloaded(repository)
    if download and revisions.at_hand(f"{repository}@{commit}") in (download, None):
        return str(revisions.fetch(repository, revisions.MODEL, model_files.SETTINGS))
    return repository


def check_same(what: str, fingerprints: dict[str, Any], commit: str | None) -> None:
    """Raise UserError (exit 8) unless the code that a base was loaded with is asked for again.

    fingerprints: of the run that loaded it; commit: asked for now, None where no code is ever run.
    """
    before = fingerprints.get(PRINT)
    if before and commit != before:
        problem = f"{what}: its base was loaded with code of its own, at commit {str(before)[:40]}."
        raise UserError(problem, code=UNSAFE)


def named(folder: Path) -> list[str]:
    """The classes of its own code that the settings of a folder name (auto_map), at any depth."""
    classes: set[str] = set()

    def look(values: dict[str, Any]) -> dict[str, Any]:
        classes.update(_texts(values.get("auto_map")))
        return values

    for path in folder.glob(SETTINGS):
        try:
            json.loads(path.read_text(encoding="utf-8"), object_hook=look)
        except (OSError, ValueError, RecursionError):
            continue  # transformers says what is wrong with it
    return sorted(classes)


def elsewhere(classes: list[str]) -> list[str]:
    """The classes of another repository or another folder, which are never run."""
    return [text for text in classes if not CLASS.fullmatch(text)]


def listed(names: list[str]) -> str:
    """The first of some names that a stranger chose, without characters that move a terminal's cursor."""
    return errors.listed([name[:80].encode("unicode_escape").decode() for name in names], SHOWN)


def needs_consent(path: str, what: str) -> UserError:
    """For a model that cannot be read without code of its own, which was not asked for."""
    classes = listed(named(Path(path)))
    problem = f"{path}: {what} needs code that comes with the model"
    fix = (
        "Read that code first (docs/safety.md). Only training, chat and perplexity can run it, when you name"
    )
    fix = f"{fix} its commit: {commands.name('interaction')} --remote_code COMMIT, for example."
    return UserError(problem + (f": {classes}." if classes else "."), fix, UNSAFE)


def verified(folder: Path, commit: str) -> list[str]:
    """The Python files of a folder that is at this commit, all as they were fetched; raises UserError."""
    record = _receipt(folder) or _snapshot(folder)
    if record is None:
        problem = f"--remote_code {commit}: no file says which commit {folder} holds."
        raise UserError(problem, f"Fetch it anew, into a folder of its own: {FETCH}", UNSAFE)
    commit_here, is_as_fetched = record
    if commit_here != commit:
        problem = f"--remote_code {commit}: {folder} is at commit {commit_here}."
        raise UserError(problem, f"Fetch the other with {FETCH}, or read the code that is there.", UNSAFE)
    classes = named(folder)
    if not classes:
        problem = f"--remote_code {commit}: {folder} names no code of its own (auto_map)."
        raise UserError(problem, "Leave the option out.")
    if strange := elsewhere(classes):
        problem = f"--remote_code {commit}: {folder} names code from elsewhere: {listed(strange)}."
        raise UserError(problem, "Only code of the model's own top folder is run.", UNSAFE)
    if (folder / GENERATE).exists():
        problem = f"--remote_code {commit}: {folder / GENERATE} would run too, and is never fetched."
        raise UserError(problem, f"Fetch the model with {FETCH}", UNSAFE)
    files = sorted(path.name for path in folder.glob("*.py"))
    changed = [name for name in files if not is_as_fetched(folder / name)]
    if changed:
        problem = f"--remote_code {commit}: {listed(changed)} in {folder} is not what was fetched."
        raise UserError(problem, f"Fetch it anew: {FETCH}", UNSAFE)
    missing = sorted({text.partition(".")[0] + ".py" for text in classes} - set(files))
    if missing:
        problem = f"--remote_code {commit}: {listed(missing)} was not fetched into {folder}."
        raise UserError(problem, f"Fetch it with {FETCH}", UNSAFE)
    return files


def _receipt(folder: Path) -> tuple[str, Callable[[Path], bool]] | None:
    """The commit of a folder that tools/download.py made, and whether a file is as it was fetched."""
    stored = manifest.read(folder)
    if stored is None:
        return None

    def is_unchanged(path: Path) -> bool:
        entry = stored["files"].get(path.name)
        return entry is not None and hashing.sha256(path) == entry["sha256"]

    return stored["commit"], is_unchanged


def _snapshot(folder: Path) -> tuple[str, Callable[[Path], bool]] | None:
    """The same for a snapshot in the hub's own cache: its name, and blobs called by their checksums."""
    place, cache = folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if place.parent.name != "snapshots" or not place.is_relative_to(cache):
        return None

    def is_unchanged(path: Path) -> bool:
        blob = path.resolve()
        is_blob = blob.parent == place.parent.parent / "blobs" and len(blob.name) in KINDS
        return is_blob and transfer.digest(blob, KINDS[len(blob.name)]) == blob.name

    return place.name, is_unchanged


def _in_cache(name: str, commit: str) -> Path:
    """The folder of a model in the hub's cache at this commit; raises UserError (exit 8) without one."""
    try:
        config = try_to_load_from_cache(name, model_files.MODEL_CONFIG, revision=commit)
    except ValueError:  # no hub name
        config = None
    if not isinstance(config, str):
        problem = f"--remote_code {commit}: {name} is not on this machine at that commit."
        raise UserError(problem, f"Fetch it, then read its code: {FETCH}", UNSAFE)
    return Path(config).parent


def _texts(value: Any) -> list[str]:
    """All texts in a value of JSON."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in _texts(part)]
    return [] if value is None else [str(value)]
