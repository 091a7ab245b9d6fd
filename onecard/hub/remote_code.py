"""Python code that comes with a model: who may run it, and the one place from which transformers does.

Nothing runs unless its commit was typed (--remote_code) and the folder holds that commit, unchanged. What a
run or a checkpoint stores is never taken for such a consent. This file knows no torch and no options.
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
from onecard.hub import manifest, model_files, revisions, transfer
from onecard.system import commands, hashing, lock
from onecard.system import files as system_files
from onecard.system.console import say

PRINT = "code of the base"  # among a run's fingerprints: the commit
SETTINGS = "*config*.json"  # which transformers may read an auto_map from
CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")  # module.Class, the module beside the settings
GENERATE = "custom_generate"  # a folder whose code transformers would run too
KINDS = {40: transfer.GIT, 64: transfer.SHA256}  # length of a blob's name in the hub's cache: its checksum
READ_FIRST = "Read that code, then ask for it with --remote_code and that commit (llama.cpp runs none)."
FETCH = f"{commands.name('download')} OWNER/MODEL --remote_code COMMIT"
LOCK = "remote_code.lock"
SHOWN = 12  # names
# how transformers words what it cannot do
NO_ROOM, NO_ATTENTION = "dispatched on the CPU", "does not support an attention implementation"
# what is no fault of the code: damaged files, memory, and what the caller tries otherwise
NOT_OF_CODE = (UserError, OSError, SafetensorError, json.JSONDecodeError)
OTHERWISE = (NO_ATTENTION, NO_ROOM)


@dataclasses.dataclass(frozen=True)
class Consent:
    """The user's word that the code of this folder, at this commit, may run."""

    folder: Path
    commit: str

    def read(self, auto: Any, **settings: Any) -> Any:
        """What transformers' Auto class reads from the folder, with the folder's own code."""
        with self._alone():
            return auto.from_pretrained(
                str(self.folder), trust_remote_code=True, local_files_only=True, **settings
            )

    def build(self, auto: Any, config: Any, **settings: Any) -> Any:
        """The Auto class's model for a config that `read` gave, without weights."""
        config.name_or_path = str(self.folder)  # where transformers looks for the code
        with self._alone():
            return auto.from_config(config, trust_remote_code=True, **settings)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What was verified is still so, and no other process has transformers copy the files meanwhile."""
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


def ask(path: str, commit: str | None) -> Consent | None:
    """The consent to run a model's code, None where it was not asked for; raises UserError (exit 8).

    path: its folder, or its name in the hub's cache. Nothing is run yet, but what is said says so.
    """
    if commit is None:
        return None
    folder = Path(path)
    if not folder.is_dir():
        folder = _in_cache(path, commit)
    files = listed(verified(folder, commit))
    say(f"code        of {path} now runs on this machine with your rights: {files}; commit {commit}")
    return Consent(folder, commit)


def place(name: str, commit: str | None) -> str | None:
    """Where `ask` finds the code of a hub's name that is asked for; None: the name is located like any other.

    It is the folder that tools/download.py made, or the bare name: `ask` finds its commit in the hub's cache.
    Raises UserError when the name says another commit.
    """
    if commit is None or name == manifest.DEMO or not revisions.is_name(name):
        return None
    alone, revision = revisions.split(name)
    if revision and revisions.COMMIT.fullmatch(revision) and revision != commit:
        problem = f"--model_path {name} and --remote_code {commit} name two commits."
        raise UserError(problem, "Name the commit whose code you read, once.")
    if revision and revision != commit:
        say(f"hub         {alone}: commit {commit} of --remote_code is used, wherever {revision} points")
    kept = manifest.kept(alone)
    if kept and revisions.at_hand(f"{alone}@{commit}") in (kept, None):
        return str(revisions.folder_of(alone, revisions.MODEL, model_files.SETTINGS))
    return alone


def check_same(what: str, fingerprints: dict[str, Any], commit: str | None) -> None:
    """Raise UserError (exit 8) unless the code that a base was loaded with is asked for again.

    fingerprints: of the run that loaded it; commit: asked for now, None where no code is ever run.
    """
    before = fingerprints.get(PRINT)
    if before and commit != before:
        problem = f"{what}: its base was loaded with code of its own, at commit {str(before)[:40]}."
        raise UserError(problem, code=UNSAFE)


def named(folder: Path) -> list[str]:
    """The classes that a folder's settings name in code of its own (auto_map), at any depth."""
    found: set[str] = set()

    def look(values: dict[str, Any]) -> dict[str, Any]:
        found.update(_texts(values.get("auto_map")))
        return values

    for path in folder.glob(SETTINGS):
        try:
            json.loads(path.read_text(encoding="utf-8"), object_hook=look)
        except (OSError, ValueError, RecursionError):
            continue  # transformers says what is wrong with it
    return sorted(found)


def elsewhere(classes: list[str]) -> list[str]:
    """Those of another repository or another folder, which are never run."""
    return [text for text in classes if not CLASS.fullmatch(text)]


def listed(names: list[str]) -> str:
    """Names that a stranger chose, for a message: some of them, nothing that moves a terminal's cursor."""
    return errors.listed([name[:80].encode("unicode_escape").decode() for name in names], SHOWN)


def needs_consent(path: str, what: str) -> UserError:
    """For a model that cannot be read without code of its own, which was not asked for."""
    classes = listed(named(Path(path)))
    problem = f"--model_path {path}: {what} needs code that comes with the model"
    fix = "Read that code first (docs/safety.md). Training, chat and perplexity then run it with its commit"
    fix = f"{fix} ({commands.name('interaction')} --remote_code COMMIT), the other programs never do."
    return UserError(problem + (f": {classes}." if classes else "."), fix, UNSAFE)


def verified(folder: Path, commit: str) -> list[str]:
    """The Python files of a folder that is at this commit, all as they were fetched; raises UserError."""
    record = _receipt(folder) or _snapshot(folder)
    if record is None:
        problem = f"--remote_code {commit}: nothing says which commit {folder} is."
        raise UserError(problem, f"Fetch it anew, into a folder of its own: {FETCH}", UNSAFE)
    there, known = record
    if there != commit:
        problem = f"--remote_code {commit}: {folder} is at commit {there}."
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
    changed = [name for name in files if not known(folder / name)]
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

    def is_known(path: Path) -> bool:
        entry = stored["files"].get(path.name)
        return entry is not None and hashing.sha256(path) == entry["sha256"]

    return stored["commit"], is_known


def _snapshot(folder: Path) -> tuple[str, Callable[[Path], bool]] | None:
    """The same of a folder in the hub's own cache: its name, and blobs that are called by their checksum."""
    place, cache = folder.resolve(), Path(constants.HF_HUB_CACHE).resolve()
    if place.parent.name != "snapshots" or not place.is_relative_to(cache):
        return None

    def is_known(path: Path) -> bool:
        blob = path.resolve()
        is_blob = blob.parent == place.parent.parent / "blobs" and len(blob.name) in KINDS
        return is_blob and transfer.digest(blob, KINDS[len(blob.name)]) == blob.name

    return place.name, is_known


def _in_cache(name: str, commit: str) -> Path:
    """The folder of a hub's model at this commit in the hub's cache; nothing is fetched."""
    try:
        found = try_to_load_from_cache(name, model_files.MODEL_CONFIG, revision=commit)
    except ValueError:  # no hub name
        found = None
    if not isinstance(found, str):
        problem = f"--remote_code {commit}: {name} is not on this machine at that commit."
        raise UserError(problem, f"Fetch it, then read its code: {FETCH}", UNSAFE)
    return Path(found).parent


def _texts(value: Any) -> list[str]:
    """All texts in a value of JSON."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in _texts(part)]
    return [] if value is None else [str(value)]
