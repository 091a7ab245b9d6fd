"""A model's name or a list of addresses -> a folder of verified files, and a receipt that names the version.

Everything is fetched into .part files first; when all are whole they get their names, and the receipt is
written last. What is cut leaves .part files, which the same command continues. The folder does not appear by
one rename as others do (system/whole_folder.py): it may exist before, with files of the user, and a new
version replaces only the files that differ. So it is whole when its receipt says so. Files that this program
has not fetched are never overwritten.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from onecard.config import options as config_options
from onecard.config.tools import FOLDER, HUB_MODEL, MODELSCOPE, NAMED_MODEL, DownloadConfig
from onecard.errors import CHECKPOINT, DISK, UNSAFE, UserError
from onecard.hub import destination, locate, manifest, remote_code, transfer
from onecard.hub import listing as hub_listing
from onecard.hub.demo import DEMO
from onecard.hub.destination import size_text
from onecard.hub.listing import Listing
from onecard.hub.transfer import SHA256, Remote, UnreachableError
from onecard.system import commands, hashing
from onecard.system import files as system_files
from onecard.system.console import say


def run(options: DownloadConfig) -> Path:
    """The folder with the model; raises UserError (2 network and options, 4 bytes, 7 disk, 8 unsafe)."""
    options = _pinned(options)
    _check_used(options)
    folder = _folder(options)
    if options.model_path == DEMO:
        return _demo(Path(locate.locate(DEMO)), folder, options.verify)
    lines = _lines(options.url_list)
    with destination.owned(folder):
        _bring(options, folder, lines)
    return folder


def _pinned(options: DownloadConfig) -> DownloadConfig:
    """--remote_code names the version too; raises UserError where there are none, or another is named."""
    if not options.remote_code:
        return options
    if options.url_list or options.source == MODELSCOPE or options.model_path == DEMO:
        problem = "--remote_code: only models of the hub have commits."
        raise UserError(problem, "Leave it out, or fetch the model from the hub.")
    if options.revision not in (None, options.remote_code):
        problem = f"--revision {options.revision} and --remote_code {options.remote_code} name two versions."
        raise UserError(problem, "Leave --revision out.")
    return dataclasses.replace(options, revision=options.remote_code)


def _check_used(options: DownloadConfig) -> None:
    """Raise UserError for options that a list or the demo makes no use of."""
    if options.url_list:
        config_options.refuse_unused(options, NAMED_MODEL)
    elif options.model_path == DEMO:
        config_options.refuse_unused(options, HUB_MODEL, *([] if options.to else [FOLDER]))


def _folder(options: DownloadConfig) -> Path | None:
    """Where it goes; None: the demo stays where it is."""
    if bool(options.model_path) == bool(options.url_list):
        raise UserError("Name a model, or give --url_list.", f"For example: {commands.name('download')} demo")
    if options.url_list and not options.to:
        raise UserError("--url_list needs a folder for its files.", "Add --to FOLDER.")
    if options.to:
        folder = Path(options.to).expanduser()
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--to {folder} is a file.", "Name a folder.")
        return folder
    if options.model_path == DEMO:
        return None
    if Path(options.model_path).exists():
        raise UserError(f"{options.model_path}: this file or folder exists already.", "It needs no download.")
    if options.model_path.count("/") != 1:
        raise UserError(f"{options.model_path} is not a hub name.", "Write owner/model, or demo.")
    return manifest.place(options.model_path)


def _lines(url_list: str | None) -> list[str]:
    """The lines of --url_list, - is stdin; [] without one. Raises UserError where there is no text."""
    if url_list is None:
        return []
    try:
        # bytes that are no text would arrive as surrogates
        whole = (
            sys.stdin.read().encode().decode()
            if url_list == "-"
            else Path(url_list).read_text(encoding="utf-8")
        )
    except (OSError, UnicodeError) as error:
        raise UserError(f"--url_list {url_list}: cannot be read ({error}).", "Name a text file.") from None
    return whole.splitlines()


def _bring(options: DownloadConfig, folder: Path, lines: list[str]) -> None:
    old = manifest.read(folder)
    _check_same(options, folder, old)
    revision = options.revision or (old["revision"] or None if old else None)
    try:
        listing = _list(options, revision, lines)
    except UnreachableError as error:
        lacks = options.remote_code and not _has_code(old, options.remote_code)
        if not old or lacks or manifest.differing(folder, old, options.verify):
            raise
        say(f"{error.problem} {folder} is whole: {len(old['files'])} files of {_version(old)}.")
        return
    for note in listing.notes:
        say(note)
    moved = old is not None and old["commit"] != listing.commit
    stays = not options.update and options.revision in (None, old and old["revision"])
    if moved and stays and not options.url_list:  # a list that was edited is to be followed
        has_moved = (
            f"{listing.name}: {listing.revision} has moved from {old['commit'][:12]} to {listing.commit[:12]}"
        )
        differing = manifest.differing(folder, old, options.verify)
        is_hub = options.source != MODELSCOPE
        if differing and not is_hub:  # which cannot be asked for an earlier version by our name of it
            problem = f"{has_moved}, and {folder} lacks {', '.join(differing[:5])} of the earlier one."
            raise UserError(problem, "Fetch the new version with --update true.")
        quiet = f", to stay without this note: --revision {old['commit']}" if is_hub else ""
        say(f"{has_moved}; this folder stays at {_version(old)}. To move with it: --update true{quiet}")
        if not differing:
            return
        listing = dataclasses.replace(_list(options, old["commit"], lines), revision=old["revision"])
    _complete(folder, listing, old, options)


def _list(options: DownloadConfig, revision: str | None, lines: list[str]) -> Listing:
    if options.url_list:
        return hub_listing.list_addresses(lines, "stdin" if options.url_list == "-" else options.url_list)
    ask = hub_listing.list_modelscope if options.source == MODELSCOPE else hub_listing.list_hub
    is_selected = hub_listing.choice(options.files, options.pickles, options.remote_code is not None)
    listing = ask(options.model_path, revision, options.endpoint, options.send_token, is_selected)
    if options.remote_code and listing.commit != options.remote_code:
        problem = f"{listing.name}: {listing.endpoint} answers with another commit, {listing.commit}."
        raise UserError(problem, "Nothing was written. Use another --endpoint, or the site itself.", UNSAFE)
    return listing


def _has_code(old: dict[str, Any] | None, commit: str) -> bool:
    return old is not None and old["commit"] == commit and any(name.endswith(".py") for name in old["files"])


def _check_same(options: DownloadConfig, folder: Path, old: dict[str, Any] | None) -> None:
    """Raise UserError when the folder holds another download."""
    source = "list" if options.url_list else options.source
    name = options.model_path or (old and old["name"])
    if old and (old["source"] != source or old["name"] != name):
        problem = f"{folder} holds {old['name']} from {old['source']}."
        raise UserError(problem, "Choose another --to.")


def _complete(
    folder: Path,
    listing: Listing,
    old: dict[str, Any] | None,
    options: DownloadConfig,
) -> None:
    """Fetch what is missing, put everything in its place, write the receipt."""
    for file in listing.files:
        transfer.check_place(folder, file.name)
    recorded = old["files"] if old else {}
    missing = [
        file for file in listing.files if not destination.is_there(folder, file, recorded, options.verify)
    ]
    foreign = [
        file.name
        for file in missing
        if not destination.may_replace(folder / file.name, recorded.get(file.name))
    ]
    if foreign:
        problem = f"{folder}: {', '.join(foreign[:5])} is there and not the file of {listing.name}."
        raise UserError(problem, "Delete it to fetch it anew, or choose another --to.", CHECKPOINT)
    destination.check_room(folder, missing)
    _fetch(folder, listing, missing)
    destination.give_names(folder, missing)
    others = destination.others(folder, listing, recorded)
    follows = (
        old is None or old["commit"] == listing.commit or (bool(options.url_list) and not options.update)
    )
    remaining, removed = (others, []) if follows else ([], others)
    if removed:
        say(f"Removed, because this version does not have them: {', '.join(removed)}")
    for name in [*removed, *destination.beginnings(folder, listing)]:
        (folder / name).unlink()
    values = destination.receipt(folder, listing)
    values["files"] |= {name: recorded[name] for name in remaining}
    if old is None or any(old[key] != value for key, value in values.items()):
        manifest.write(folder, values)
    size = size_text(sum(file.size or 0 for file in missing))
    fetched = f"{size} fetched" if missing else "nothing to fetch"
    say(f"{len(listing.files)} files, {fetched}; all checksums are right. {_version(values)}")
    _tell_code(folder, options, values)


def _fetch(folder: Path, listing: Listing, missing: list[Remote]) -> None:
    size = sum(file.size or 0 for file in missing)
    total = tqdm(total=size, desc="total", unit="B", unit_scale=True, disable=None if missing else True)
    with transfer.connect(listing.hosts) as client, total:
        for number, file in enumerate(missing, 1):
            if total.disable:
                print(f"{number}/{len(missing)} {file.name}, {size_text(file.size or 0)}", file=sys.stderr)
            part = transfer.fetch(client, file, folder, listing.headers, total)
            system_files.sync_file(part)


def _demo(source: Path, folder: Path | None, again: bool) -> Path:
    """The demo model, in the cache or copied byte for byte; again: read what is there already in full."""
    if folder is None:
        say(f"The demo model is in {source}.")
        return source
    values = {"source": DEMO, "name": DEMO, "revision": "", "commit": source.name, "endpoint": ""}
    old = manifest.read(folder)
    if old and old["name"] != DEMO:
        raise UserError(f"{folder} holds {old['name']} from {old['source']}.", "Choose another --to.")
    paths = [path for path in sorted(source.iterdir()) if path.is_file()]
    digests = hashing.of_files(paths)
    files = [Remote(path.name, "", path.stat().st_size, SHA256, digests[path]) for path in paths]
    listing = Listing(**values, files=files)
    with destination.owned(folder):
        missing = [file for file in files if not destination.is_there(folder, file, {}, again)]
        foreign = [file.name for file in missing if os.path.lexists(folder / file.name)]
        if foreign:
            problem = f"{folder}: {', '.join(foreign[:5])} is there and not the demo's."
            raise UserError(problem, "Delete it, or choose another --to.", CHECKPOINT)
        destination.check_room(folder, missing)
        for file in missing:
            part = file.part(folder)
            shutil.copyfile(source / file.name, part)
            if transfer.digest(part, SHA256) != file.digest:
                raise UserError(
                    f"{part}: the file differs from what was written.",
                    "The disk may be damaged; use another one.",
                    DISK,
                )
            system_files.sync_file(part)
        destination.give_names(folder, missing)
        if not old:
            manifest.write(folder, destination.receipt(folder, listing))
    say(f"{len(missing)} files copied, {len(files) - len(missing)} there already; all checksums are right.")
    return folder


def _tell_code(folder: Path, options: DownloadConfig, values: dict[str, Any]) -> None:
    """Say when a model names code of its own, whether it is here now, and what makes it run."""
    classes = remote_code.named(folder)
    named = remote_code.listed(classes)
    files = remote_code.listed(sorted(name for name in values["files"] if name.endswith(".py")))
    if strange := remote_code.elsewhere(classes):
        away = remote_code.listed(strange)
        say(f"It names code from elsewhere (auto_map: {away}), which is never fetched or run.")
    elif files and named:
        say(f"Its own code is here too: {files}. Read it; nothing of it has been run.")
        say(f"To run it when training or chatting: --remote_code {values['commit']}")
    elif named:
        say(f"It names code of its own (auto_map: {named}), which was not fetched.")
        say("Nothing runs it unless asked. To fetch and read it: the same line with --remote_code COMMIT")
    elif options.remote_code:
        say("It names no code of its own (auto_map): --remote_code is not needed for it.")


def _version(values: dict[str, Any]) -> str:
    what = f"{values['name']}, " if values["source"] != "list" else ""
    revision = f"{values['revision']}, " if values["revision"] not in ("", values["commit"]) else ""
    return f"{what}{revision}commit {values['commit']}"
