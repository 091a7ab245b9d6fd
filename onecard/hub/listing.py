"""What a model hub, ModelScope or a list of addresses offers -> the files to fetch, each with its checksum.

Names that could leave a folder are refused here, before anything is written. No file is fetched here but the
lists themselves.
"""

import collections
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from onecard.config.checks import COMMIT
from onecard.errors import UNSAFE, UserError, first_line
from onecard.hub import manifest, model_files, transfer
from onecard.hub.addresses import Hosts
from onecard.hub.transfer import GIT, MD5, SHA256, Remote, UnreachableError

PICKLED = (".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".joblib")
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")
HUB_SITE = "https://huggingface.co"
MODELSCOPE_SITES = ("https://www.modelscope.cn", "https://modelscope.cn", "https://www.modelscope.ai")
MODELSCOPE_MOST = 3000  # entries; near its limit the list may be cut short
LISTS = ".chk"  # md5sum's format, as original-format LLaMA folders carry it
LENGTHS = {64: SHA256, 32: MD5}


@dataclasses.dataclass(frozen=True)
class Listing:
    """What one version of a model consists of."""

    source: str
    name: str
    revision: str  # as the user named it
    commit: str
    endpoint: str
    files: list[Remote]
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)  # for its own host
    notes: tuple[str, ...] = ()
    hosts: Hosts = dataclasses.field(default_factory=Hosts)  # that may be asked for the files


def list_hub(
    name: str,
    revision: str | None,
    endpoint: str | None,
    send_token: bool,
    is_selected: Callable[[str], bool],
) -> Listing:
    """One version of a repository on the hub; raises UserError, UnreachableError without a connection."""
    import huggingface_hub
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    site, hosts = _endpoint(endpoint or os.environ.get("HF_ENDPOINT"), HUB_SITE)
    _refuse_offline(name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name}: {first_line(error).rstrip('.')}.", "Write a hub name as owner/model."
        ) from None
    token, notes = _token(huggingface_hub.get_token(), site, (HUB_SITE,), send_token, site == HUB_SITE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    version = revision or "main"
    # asked for here and not through HfApi, which has a client of its own that follows every redirect
    url = f"{site}/api/models/{name}/revision/{quote(version, safe='')}?blobs=true"
    with transfer.connect(hosts) as client:
        answer = _json(transfer.get(client, url, headers, name))
    commit = answer.get("sha") if isinstance(answer, dict) else None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _not_a_list(name, site, "no commit")
    entries = answer.get("siblings") or []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _not_a_list(name, site, "no list of files")
    files = []
    for entry in _checked([each.get("rfilename") for each in entries], site, is_selected, entries):
        path, large = entry["rfilename"], entry.get("lfs")
        kind, digest = (
            (SHA256, large.get("sha256")) if isinstance(large, dict) else (GIT, entry.get("blobId"))
        )
        url = huggingface_hub.hf_hub_url(name, path, revision=commit, endpoint=site)
        files.append(_file(path, url, entry.get("size"), kind, digest, site))
    return Listing("hub", name, version, commit, site, files, headers, notes, hosts)


def list_modelscope(
    name: str,
    revision: str | None,
    endpoint: str | None,
    send_token: bool,
    is_selected: Callable[[str], bool],
) -> Listing:
    """One version of a repository on ModelScope; raises as list_hub.

    Its list names no commit of the whole: a SHA-256 of names and checksums stands for it.
    """
    site, hosts = _endpoint(endpoint or os.environ.get("MODELSCOPE_ENDPOINT"), MODELSCOPE_SITES[0])
    _refuse_offline(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise UserError(f"{name} is not a ModelScope name.", "Write it as owner/model.")
    own_token = os.environ.get("MODELSCOPE_API_TOKEN")
    token, notes = _token(own_token, site, MODELSCOPE_SITES, send_token, site in MODELSCOPE_SITES)
    headers = {"Cookie": f"m_session_id={token}"} if token else {}  # how its own client sends it
    version, base = revision or "master", f"{site}/api/v1/models/{name}/repo"
    query = urlencode({"Revision": version, "Recursive": "True"})
    with transfer.connect(hosts) as client:
        answer = _json(transfer.get(client, f"{base}/files?{query}", headers, name))
    entries = (answer.get("Data") or {}).get("Files") if isinstance(answer, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        message = answer.get("Message") if isinstance(answer, dict) else None
        raise _not_a_list(name, site, message or "no list of files")
    if len(entries) >= MODELSCOPE_MOST:
        raise UserError(f"{name}: too many files for ModelScope's list.", "Use the hub, or --url_list.")
    blobs = [entry for entry in entries if entry.get("Type") != "tree"]
    files = []
    for entry in _checked([each.get("Path") for each in blobs], site, is_selected, blobs):
        path, pinned = entry["Path"], entry.get("Revision")
        where = {"Revision": pinned if isinstance(pinned, str) and pinned else version, "FilePath": path}
        url = f"{base}?{urlencode(where, quote_via=quote)}"
        files.append(_file(path, url, entry.get("Size"), SHA256, entry.get("Sha256"), site))
    lines = sorted(f"{each.get('Path')} {each.get('Sha256')}" for each in blobs)
    commit = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return Listing("modelscope", name, version, commit, site, files, headers, notes, hosts)


def list_addresses(lines: Iterable[str], source: str) -> Listing:
    """Files from lines of `URL [NAME] [CHECKSUM]`; raises UserError naming the line.

    CHECKSUM: SHA-256 or MD5, hexadecimal; without one it comes from a listed NAME.chk (md5sum's format),
    which is read first. NAME: path inside the folder; without one the address's last part.
    """
    entries: list[tuple[str, str, str]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        url, rest = words[0], words[1:]
        digest = (
            rest.pop().lower() if rest and re.fullmatch(r"[0-9A-Fa-f]{32}|[0-9A-Fa-f]{64}", rest[-1]) else ""
        )
        name = rest.pop(0) if rest else urlsplit(url).path.rpartition("/")[2]
        if rest or urlsplit(url).scheme not in ("http", "https"):
            raise UserError(f"{source}, line {number}: not `URL [NAME] [CHECKSUM]`.", "See docs/tools.md.")
        entries.append((transfer.check_name(name, f"{source}, line {number},"), url, digest))
    if not entries:
        problem = f"{source}: the list names no file."
        raise UserError(problem, "Write one `URL [NAME] [CHECKSUM]` a line, as docs/tools.md says.")
    _refuse_offline(source)
    _refuse_twice([name for name, _, _ in entries], source)
    hosts = Hosts(url for _, url, _ in entries)
    with transfer.connect(hosts) as client:
        sums: dict[str, str] = {}
        lists: dict[str, bytes] = {}
        for name, url, _ in entries:
            if name.endswith(LISTS):
                lists[name] = transfer.get(client, url, {}, name)
                sums |= _sums(lists[name].decode("utf-8", "replace"), name)
        files, missing = [], []
        for name, url, digest in entries:
            if name in lists and not digest:
                digest = hashlib.sha256(lists[name]).hexdigest()
            digest = digest or sums.get(name, "")
            if not digest:
                missing.append(name)
                continue
            empty = Remote(name, url, None, LENGTHS[len(digest)], digest)
            files.append(dataclasses.replace(empty, size=transfer.ask_size(client, empty, {})))
    if missing:
        problem = f"{source}: no checksum for {', '.join(missing)}."
        raise UserError(problem, "Write it behind the address, or list a .chk that has it.")
    commit = hashlib.sha256("\n".join(sorted(f"{file.name} {file.digest}" for file in files)).encode())
    names = sorted({urlsplit(file.url).hostname or "" for file in files})
    return Listing("list", source, "", commit.hexdigest(), ", ".join(names), files, hosts=hosts)


def choice(patterns: str | None, pickles: bool, code: bool = False) -> Callable[[str], bool]:
    """Which names are fetched: those of the patterns or what transformers loads; pickles, code on request.

    code: Python files of the top folder, the only ones that transformers runs; other programs never come.
    """
    globs = [part.strip() for part in (patterns or "").split(",") if part.strip()]

    def is_selected(name: str) -> bool:
        lower = name.lower()
        if code and name.endswith(".py") and "/" not in name:
            return True
        if lower.endswith(CODE) or (lower.endswith(PICKLED) and not pickles) or name == manifest.NAME:
            return False
        if globs:
            return _is_any(name, globs)
        usual = lower.endswith(PICKLED) or _is_any(lower, (*model_files.TENSORS, *model_files.SETTINGS))
        return usual and not _is_any(lower, model_files.NOT_LOADED)

    return is_selected


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _checked(
    names: list[Any], source: str, is_selected: Callable[[str], bool], entries: list[Any]
) -> list[Any]:
    """The selected entries; raises UserError for unsafe names, selected or not, and when none is left."""
    for name in names:
        transfer.check_name(name, source)
    _refuse_twice(names, source)
    chosen = [entry for name, entry in zip(names, entries, strict=True) if is_selected(name)]
    weights = (".safetensors", ".gguf")
    pickled = [name for name in names if name.lower().endswith(PICKLED)]
    if pickled and not is_selected(pickled[0]) and not any(name.lower().endswith(weights) for name in names):
        problem = f"Its weights are pickled ({', '.join(pickled[:3])}), which can carry code."
        raise UserError(problem, "Fetch them with --pickles true when you trust their owner.", UNSAFE)
    if not chosen:
        raise UserError(
            f"{source}: none of the files of this model was selected.",
            f"It has: {', '.join(names[:12]) or 'no files'}.",
        )
    return chosen


def _refuse_twice(names: list[str], source: str) -> None:
    counts = collections.Counter(names)
    folders = {name[:at] for name in names for at, letter in enumerate(name) if letter == "/"}
    twice = sorted(name for name in counts if counts[name] > 1 or name in folders)
    if twice:
        problem = f"{source} offers two files with the same name: {', '.join(twice[:4])}."
        raise UserError(problem, "Nothing was written. Do not use this source.", UNSAFE)


def _file(name: str, url: str, size: Any, kind: str, digest: Any, site: str) -> Remote:
    length = {SHA256: 64, GIT: 40}[kind]
    if not isinstance(size, int) or size < 0 or not re.fullmatch(rf"[0-9a-f]{{{length}}}", str(digest)):
        problem = f"{name}: {site} gives no size and checksum for it."
        raise UserError(problem, "Use another --endpoint, or the site itself.")
    return Remote(name, url, size, kind, digest)


def _token(
    token: str | None, site: str, official: tuple[str, ...], send: bool, own: bool
) -> tuple[str | None, tuple[str, ...]]:
    """The token for this site, and what to say when it stays here."""
    if not token or own or send:
        return token, ()
    return None, (f"your token is for {official[0]} and was not sent to {site} (--send_token)",)


def _endpoint(typed: str | None, usual: str) -> tuple[str, Hosts]:
    """The site, and the hosts that may be asked: one that the user named may lie anywhere."""
    site = (typed or usual).rstrip("/")
    if urlsplit(site).scheme not in ("http", "https") or not urlsplit(site).hostname:
        raise UserError(f"--endpoint {site} is not an address.", f"It looks like {usual}.")
    return site, Hosts([site] if typed else [])


def _refuse_offline(name: str) -> None:
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        raise UnreachableError(f"{name}: HF_HUB_OFFLINE is set.", "Unset it, or name a local folder.")


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _sums(text: str, name: str) -> dict[str, str]:
    """File name -> MD5, as md5sum writes it; names are meant beside the list itself."""
    folder = name.rpartition("/")[0]
    sums = {}
    for line in text.splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](?:\./)?(\S.*)", line.rstrip())
        if match:
            sums[f"{folder}/{match[2]}" if folder else match[2]] = match[1].lower()
    return sums


def _not_a_list(name: str, site: str, reason: Any) -> UserError:
    return UserError(f"{name}: {site} gives no list of its files ({str(reason)[:200]}).", "Check --endpoint.")
