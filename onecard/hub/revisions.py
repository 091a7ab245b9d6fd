"""Finds the folder of a hub name at one commit, and compares what a run recorded with what is used now.

owner/name means the commit that its branch points to now; owner/name@REVISION names a commit, a branch or a
tag. The hub is asked only about names that the user typed, once in a session and for a few seconds. What a
run recorded is looked for on this machine alone.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download

from onecard.config import checks
from onecard.config.tools import HUB, MODELSCOPE
from onecard.errors import UserError
from onecard.hub import client, demo, manifest, model_files
from onecard.hub import session as hub_session
from onecard.system import files as system_files
from onecard.system.console import say

MODEL, DATASET = "model", "dataset"
KINDS = {f"{kind}s": kind for kind in (MODEL, DATASET)}  # how the folders in the hub's cache begin
NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
COMMIT = re.compile(rf"{checks.COMMIT.pattern}([0-9a-f]{{24}})?")  # the longer one stands for ModelScope's
FILES = (".gguf", ".json", ".safetensors", ".bin")  # no hub name ends so
BRANCH = "main"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclasses.dataclass(frozen=True)
class Version:
    """A repository at one commit."""

    name: str
    commit: str
    kind: str = MODEL
    source: str = HUB  # or ModelScope, whose commits and owners are others

    def __str__(self) -> str:
        where = "" if self.source == HUB else f"{self.source}:"
        return f"{where}{self.name}@{self.commit}"


def is_name(text: str) -> bool:
    """Whether a text can be a name of the hub, and is no path that exists."""
    return bool(NAME.fullmatch(text)) and not text.endswith(FILES) and not Path(text).exists()


def split(text: str) -> tuple[str, str | None]:
    """(owner/name, revision or None) of owner/name@revision."""
    name, _, revision = text.partition("@")
    return name, revision or None


def parsed(text: str | None) -> Version | None:
    """The Version that str(Version) wrote; None for anything else, such as a name without a commit."""
    source, _, rest = (text or "").rpartition(":")
    name, commit = split(rest)
    is_whole = commit is not None and COMMIT.fullmatch(commit) and is_name(rest)
    is_version = is_whole and source in ("", MODELSCOPE)
    return Version(name, commit, source=source or HUB) if is_version else None


def of(path: Path | str) -> Version | None:
    """The version of a folder, or of a file in a snapshot; None where nothing says which it is."""
    path = Path(path)
    stored = None
    with contextlib.suppress(UserError):  # a damaged receipt says nothing
        stored = manifest.read(path) if path.is_dir() else None
    if stored and stored["source"] != "list" and stored["name"] != demo.DEMO:
        source = MODELSCOPE if stored["source"] == MODELSCOPE else HUB
        return Version(stored["name"], stored["commit"], source=source)
    return _in_cache(path)


def recorded(name: str, version: str | None, stored: bool = False) -> str:
    """The version of the hub that was recorded for a name, when the name has no revision; else the name.

    stored: the name was recorded together with the version, so its revision is where the version came from.
    """
    record = parsed(version)
    repository = split(name)[0] if stored else name
    if record is None or record.source != HUB or record.name != repository or Path(name).exists():
        return name
    return str(record)


def of_settings(values: dict[str, Any]) -> str | None:
    """The base that an adapter's adapter_config.json names, with its commit where peft wrote one."""
    base = values.get("base_model_name_or_path")
    base = base if isinstance(base, str) and base else None
    return base and recorded(base, f"{base}@{values.get('revision')}")


def at_hand(text: str, kind: str = MODEL) -> Path | None:
    """The folder of a hub name, when it is on this machine with its weights or rows; else None.

    OneCard or another program has fetched it. The hub is not asked.
    """
    name, revision = split(text)
    if name == demo.DEMO:
        return None
    download = _downloaded(name, revision, kind)
    snapshots = _cached(name, revision, kind)
    return download or (snapshots[0] if snapshots and _has_content(snapshots[0], kind) else None)


def say_commit(folder: Path) -> None:
    """Say which commit of the hub a folder is, where something says so."""
    version = of(folder)
    if version:
        say(f"{version.source:<12}{version.name} is commit {version.commit}")


def fetch(text: str, kind: str, patterns: tuple[str, ...]) -> Path:
    """Fetch the files of these patterns for a name that the user typed, and say its commit; the folder.

    In one session (session.py) a name means one commit, which is asked for and said once. What
    tools/download.py fetched by the name stays what the name means. Where the hub gives no commit or no
    files, it is the commit that the cache has. A commit that is whole in the cache is not asked for. Raises
    one of client.REFUSALS.
    """
    session, key = hub_session.current(), (text, kind, patterns)
    with session.lock:
        if key not in session.folders:
            session.folders[key] = _fetch(text, kind, patterns, session)
        return session.folders[key]


def _fetch(text: str, kind: str, patterns: tuple[str, ...], session: hub_session.Session) -> Path:
    name, revision = split(text)
    downloaded = _downloaded(name, revision, kind)
    if downloaded:
        version = of(downloaded) or Version(name, "unknown")
        say(f"{version.source:<12}{name} is commit {version.commit}, which is in {downloaded}")
        return downloaded
    cached = _cached(name, revision, kind)
    if (
        cached
        and cached[0].name == revision
        and _is_whole(cached[0], Version(name, revision, kind), patterns)
    ):
        say(f"hub         {name} is commit {revision}")
        return cached[0]
    branch = revision or BRANCH
    try:
        commit = client.ask_commit(name, kind, branch)
        before = _ref(name, kind, branch)
        if before not in (None, commit):
            moved = f"{branch} has moved from {before[:12]} to {commit[:12]} since it was last fetched"
            say(f"hub         {name}: {moved}. To stay: {name}@{before}")
        folder = _bring(Version(name, commit, kind), patterns)
    except client.REFUSALS as error:
        if not cached or client.is_local(error):
            raise
        say(f"hub         {name}: {client.reason(error)}; commit {cached[0].name} of the cache is used")
        return cached[0]
    _note(name, kind, branch, commit)
    session.answered.add(folder)
    say(f"hub         {name} is commit {commit}")
    return folder


def complete(folder: Path, patterns: Iterable[str]) -> None:
    """Fetch the weights that a folder of `fetch` lacks; raises one of client.REFUSALS.

    Any other folder stays as it is, also one that the hub's client keeps: the user named it by its path.
    """
    version = of(folder) if folder in hub_session.current().answered else None
    if version and not _has_weights(folder):
        _bring(version, (*patterns,))


def compare(record: str | None, used: Path | str) -> None:
    """Say when the version that was recorded is not the one in use. The hub is not asked."""
    before, now = parsed(record), of(used)
    if before and now and now.name == before.name and str(now) != str(before):
        there, here = (
            version.commit + (" of ModelScope" if version.source == MODELSCOPE else "")
            for version in (before, now)
        )
        say(f"{before.source:<12}{before.name}: commit {there} was trained on, {here} is used")


def tell_move(record: str) -> None:
    """Ask the hub, once in a session, what a name means now that was recorded at this commit; say a move.

    It is for names that the user typed. The recorded commit is used in any case.
    """
    session = hub_session.current()
    with session.lock:
        if record not in session.looked_up:
            session.looked_up.add(record)
            _tell_move(parsed(record))


def _tell_move(version: Version) -> None:
    downloaded = _downloaded(version.name, None, MODEL)
    ours = of(downloaded) if downloaded else None
    if ours and ours.source != HUB:
        return
    try:
        head = ours.commit if ours else client.ask_commit(version.name, MODEL, BRANCH)
    except client.REFUSALS as error:
        why = client.reason(error)
        say(f"hub         {version.name}: {why}; commit {version.commit} of the cache is used")
        return
    if head != version.commit:
        moved = f"has moved from {version.commit[:12]} to {head[:12]}"
        way = f"--model_path {version.name}@{head}"
        say(f"hub         {version.name} {moved}; the first, which was trained on, is used. To change: {way}")


def _downloaded(name: str, revision: str | None, kind: str) -> Path | None:
    """What tools/download.py fetched by a name, where it is of that revision."""
    folder = manifest.downloaded(name) if kind == MODEL else None
    return folder if folder and revision in (None, manifest.read(folder)["commit"]) else None


def _place(name: str, kind: str) -> Path:
    """The folder of a repository in the hub's own cache."""
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"


def _cached(name: str, revision: str | None, kind: str) -> list[Path]:
    """Snapshots in the hub's cache that a name can mean, those with content first; none for a name unknown.

    For a branch it is the commit when it was last fetched; for the usual one, others may stand in, the newest
    first.
    """
    if not NAME.fullmatch(name) or len(name) > 200:
        return []
    snapshots = _place(name, kind) / "snapshots"
    is_commit = COMMIT.fullmatch(revision or "")
    commit = revision if is_commit else _ref(name, kind, revision or BRANCH)
    candidates = [snapshots / commit] if commit else []
    if revision in (None, BRANCH) and snapshots.is_dir():
        candidates += sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
    candidates = [
        folder for folder in dict.fromkeys(candidates) if COMMIT.fullmatch(folder.name) and folder.is_dir()
    ]
    return sorted(
        candidates, key=lambda folder: not _has_content(folder, kind)
    )  # else they stay in their order


def _ref(name: str, kind: str, branch: str) -> str | None:
    """The commit of a branch when it was last fetched, None when it was not."""
    path, text = _ref_file(name, kind, branch), ""
    with contextlib.suppress(OSError, ValueError):
        text = path.read_text(encoding="utf-8").strip() if path and path.is_file() else ""
    return text if COMMIT.fullmatch(text) else None


def _ref_file(name: str, kind: str, branch: str) -> Path | None:
    """Where the hub's client keeps the commit of a branch; None for what is no branch's name."""
    inside = Path(branch)
    if inside.is_absolute() or ".." in inside.parts or COMMIT.fullmatch(branch):
        return None
    return _place(name, kind) / "refs" / inside


def _note(name: str, kind: str, branch: str, commit: str) -> None:
    """Keep the commit of a branch where the hub's client has it, once its files are there and it was said."""
    path = _ref_file(name, kind, branch)
    if path:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            path.parent.mkdir(parents=True, exist_ok=True)
            system_files.replace(path, commit.encode())


def _has_content(folder: Path, kind: str) -> bool:
    """Whether a snapshot has weights, all that its index names, or a dataset's any file but a text on it."""
    if kind == DATASET:
        return any(path.is_file() and path.suffix not in ("", ".md") for path in folder.rglob("*"))
    return (
        _has_weights(folder)
        or any(folder.glob("*.gguf"))
        or any((folder / name).is_file() for name in ADAPTERS)
    )


def _has_weights(folder: Path) -> bool:
    """Whether a snapshot has what its index names, or its one file of weights."""
    with contextlib.suppress(UserError):
        return bool(model_files.files_of(folder))
    return False


def _is_whole(folder: Path, version: Version, patterns: tuple[str, ...]) -> bool:
    """Whether a model's snapshot lacks nothing, by the list of its files, if one was kept, and their kinds.

    Of a dataset's nothing else says which files it should have.
    """
    if version.kind == DATASET:
        return False
    try:
        snapshot_download(version.name, **_arguments(version, patterns), local_files_only=True)
    except client.REFUSALS:
        return False
    has_words = patterns != model_files.SETTINGS or any(folder.glob("*token*"))
    return has_words and _has_content(folder, version.kind)


def _in_cache(path: Path) -> Version | None:
    """The version of a snapshot in the hub's own cache, or of a file in it, by the folders' names."""
    cache = Path(constants.HF_HUB_CACHE)
    place = path.resolve() if path.is_dir() else path.parent.resolve() / path.name  # a file is a link
    ways = (place, cache.resolve()), (path.absolute(), cache.absolute())  # a repository may be a link, too
    inner = [way.relative_to(start).parts for way, start in ways if way.is_relative_to(start)]
    repository, inside, commit = (*(inner[0] if inner else ()), "", "", "")[:3]
    kinds, _, name = repository.partition("--")
    if kinds not in KINDS or inside != "snapshots" or not COMMIT.fullmatch(commit):
        return None
    return Version(name.replace("--", "/"), commit, KINDS[kinds])


def _arguments(version: Version, patterns: tuple[str, ...]) -> dict[str, Any]:
    arguments = {"repo_type": version.kind, "revision": version.commit, "allow_patterns": list(patterns)}
    return (
        {**arguments, "ignore_patterns": list(model_files.NOT_LOADED)} if version.kind == MODEL else arguments
    )


def _bring(version: Version, patterns: tuple[str, ...]) -> Path:
    """The snapshot of a version with these files; raises one of client.REFUSALS."""
    client.limit_waits()
    return Path(snapshot_download(version.name, **_arguments(version, patterns)))
