"""Names of the hub -> folders at one commit, and what a run recorded -> whether the name still means it.

owner/name is what its branch points to now, owner/name@REVISION a commit, a branch or a tag. A name is asked
for once: a program works with the files of one commit, from the hub's cache or from tools/download.py.
"""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import (
    HfApi,
    constants,
    resolve_revision,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import RevisionNotFoundError, RevisionResolutionError

from onecard import layouts, receipt, runfolder
from onecard.errors import UserError

MODEL, DATASET = "model", "dataset"
KINDS = {f"{kind}s": kind for kind in (MODEL, DATASET)}  # as the cache calls their folders
NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # of git; the longer one stands for ModelScope's
FILES = (".gguf", ".json", ".safetensors", ".bin")  # no hub name ends so
PATIENCE = 10.0  # seconds
BRANCH = "main"
REFUSALS = (OSError, ValueError, httpx2.HTTPError, RevisionResolutionError)  # of the hub's client
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Version:
    """A repository of the hub at one commit."""

    name: str
    commit: str
    kind: str = MODEL

    def __str__(self) -> str:
        return f"{self.name}@{self.commit}"


def is_name(text: str) -> bool:
    """Whether this can only be a name of the hub."""
    return bool(NAME.fullmatch(text)) and not text.endswith(FILES) and not Path(text).exists()


def split(text: str) -> tuple[str, str | None]:
    """(owner/name, revision or None)."""
    name, _, revision = text.partition("@")
    return name, revision or None


def parsed(text: str | None) -> Version | None:
    """The version that owner/name@COMMIT names; None for anything else, such as a name alone."""
    name, commit = split(text or "")
    is_whole = commit is not None and COMMIT.fullmatch(commit) and is_name(text)
    return Version(name, commit) if is_whole else None


def of(path: Path | str) -> Version | None:
    """The version that a folder is, or a file in it, None where nothing says so."""
    path = Path(path)
    stored = None
    with contextlib.suppress(UserError):  # a damaged receipt says nothing
        stored = receipt.read(path) if path.is_dir() else None
    if stored and stored["source"] != "list" and stored["name"] != receipt.DEMO:
        return Version(stored["name"], stored["commit"])
    return _in_cache(path)


def recorded(name: str, version: str | None) -> str:
    """The version that was recorded for a name that says none itself, else the name."""
    known = parsed(version)
    return str(known) if known and known.name == name and not Path(name).exists() else name


def of_settings(values: dict[str, Any]) -> str | None:
    """The base that an adapter's adapter_config.json names, with its commit where peft wrote one."""
    base = values.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    return base and recorded(base, f"{base}@{values.get('revision')}")


def at_hand(text: str) -> Path | None:
    """The folder of a hub's model that is on this machine, fetched by us or by another program, or None."""
    name, revision = split(text)
    folder = receipt.kept(name)
    if folder and revision in (None, receipt.read(folder)["commit"]):
        return folder
    try:
        found = try_to_load_from_cache(name, runfolder.MODEL_CONFIG, revision=revision)
    except ValueError:  # no hub name
        return None
    return Path(found).parent if isinstance(found, str) else None


@functools.cache  # in one program a name means one commit, which is said once
def folder_of(text: str, kind: str, patterns: tuple[str, ...], say: Say) -> Path:
    """The folder of a name of the hub with the files of these patterns; raises one of REFUSALS.

    What tools/download.py fetched by the name stays what the name means. Without network it is the commit
    that the cache has.
    """
    name, revision = split(text)
    kept = receipt.kept(name) if kind == MODEL else None
    if kept and revision in (None, receipt.read(kept)["commit"]):
        say(f"hub         {name} is commit {receipt.read(kept)['commit']}, which is in {kept}")
        return kept
    branch = revision or BRANCH
    before = _fetched(name, kind, branch)
    commit = resolve_revision(name, repo_type=kind, revision=branch).resolved
    folder = _bring(Version(name, commit, kind), patterns)
    if before not in (None, commit):
        moved = f"{branch} has moved from {before[:12]} to {commit[:12]} since it was last fetched"
        say(f"hub         {name}: {moved}; the new one is used. To stay: {name}@{before}")
    say(f"hub         {name} is commit {commit}")
    return folder


def _fetched(name: str, kind: str, branch: str) -> str | None:
    """The commit of a branch when it was last fetched, None when it was not."""
    with contextlib.suppress(RevisionResolutionError):
        return resolve_revision(name, repo_type=kind, revision=branch, local_files_only=True).resolved
    return None


def _in_cache(path: Path) -> Version | None:
    """The version of a snapshot in the hub's own cache, or of a file in it, by the folders' names."""
    cache = Path(constants.HF_HUB_CACHE).resolve()
    place = path.resolve() if path.is_dir() else path.parent.resolve() / path.name  # a file is a link
    if not place.is_relative_to(cache):
        return None
    repository, inside, commit = (*place.relative_to(cache).parts, "", "", "")[:3]
    kinds, _, name = repository.partition("--")
    if kinds not in KINDS or inside != "snapshots" or not COMMIT.fullmatch(commit):
        return None
    return Version(name.replace("--", "/"), commit, KINDS[kinds])


def complete(folder: Path, patterns: Iterable[str]) -> None:
    """Fetch what a snapshot in the hub's cache lacks of these; raises one of REFUSALS. Others stay."""
    version = _in_cache(folder)
    if version:
        _bring(version, (*patterns,))


@functools.cache
def _bring(version: Version, patterns: tuple[str, ...]) -> Path:
    """The snapshot of a version with these files; raises one of REFUSALS."""
    wanted = {"repo_type": version.kind, "revision": version.commit, "allow_patterns": list(patterns)}
    if version.kind == MODEL:
        wanted["ignore_patterns"] = list(layouts.NOT_LOADED)
    try:
        return Path(snapshot_download(version.name, **wanted))
    except RevisionNotFoundError:  # a branch that was rewritten: what was fetched before is here
        return Path(snapshot_download(version.name, **wanted, local_files_only=True))


def compare(record: str | None, used: Path | str, say: Say) -> None:
    """Say it when the version that was recorded is not the one in use, or no more what its name means."""
    before, now = parsed(record), of(used)
    if before is None:
        return
    if now and now.name == before.name and now.commit != before.commit:
        say(f"hub         {before.name}: commit {before.commit} was trained on, {now.commit} is used")
        return
    head = _means_now(before)
    if head not in (None, before.commit):
        moved = f"has moved from {before.commit[:12]} to {head[:12]}"
        way = f"--model_path {before.name}@{head}"
        say(f"hub         {before.name} {moved}; the first, which was trained on, is used. To change: {way}")


def _means_now(version: Version) -> str | None:
    """The commit that a name alone would be now, None when that cannot be known."""
    folder = receipt.kept(version.name)
    if folder:
        return receipt.read(folder)["commit"]
    with contextlib.suppress(*REFUSALS):
        return HfApi().repo_info(version.name, timeout=PATIENCE).sha
    return None
