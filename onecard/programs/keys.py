"""Create, list, revoke and rotate the API keys of the HTTP service on this machine.

python serve/keys.py create alice --expires 30d --scopes chat,jobs
python serve/keys.py list
python serve/keys.py revoke alice
"""

from __future__ import annotations

import time
import typing

from onecard.config import options as config_options
from onecard.config import serving as config_serving
from onecard.errors import UserError
from onecard.system.console import say

if typing.TYPE_CHECKING:
    from onecard.serving.keys import Entry, Keys

SETTINGS = config_serving.KeysConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory
ONCE = "This is the only time that the key is shown:"


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    config_serving.check_used(options)
    if options.action != config_serving.LIST and not options.name:
        raise UserError(f"{options.action}: no key is named.", "Add the name of the key.")
    from onecard.serving import store as serving_store  # imported late, because --help needs no database

    folder = serving_store.folder_of(options.data_dir)
    with serving_store.opened(folder) as store:
        run(options, store.keys)


def run(options: config_serving.KeysConfig, keys: Keys) -> None:
    """Carry out one action and print what it did; a new key is the last line."""
    seconds = config_serving.seconds_of(options.expires) if options.expires else None
    name = options.name or ""
    if options.action == config_serving.LIST:
        say(table(keys.entries(), time.time()))
    elif options.action == config_serving.CREATE:
        scopes = config_serving.scopes_of(options.scopes)
        key, secret = keys.create(name, scopes, options.owner, seconds, options.requests_per_minute)
        may = f"{', '.join(sorted(key.scopes))}, {key.requests_per_minute} requests per minute"
        say(f"Created {key.name} ({key.id}) for {may}. It expires: {moment(key.expires)}.\n{ONCE}\n{secret}")
    elif options.action == config_serving.ROTATE:
        key, secret = keys.rotate(name, seconds=seconds)
        say(f"Rotated {key.name} ({key.id}): the old text is invalid. It expires: {moment(key.expires)}.")
        say(f"{ONCE}\n{secret}")
    else:
        key = keys.revoke(name)
        say(f"Revoked {key.name} ({key.id}). The next request with it is refused.")


def table(entries: list[Entry], now: float) -> str:
    """The keys as lines of columns; now: seconds since 1970."""
    rows = [("name", "id", "begins with", "owner", "scopes", "per minute", "created", "expires", "state")]
    for entry in entries:
        key = entry.key
        row = (key.name, key.id, entry.prefix, key.owner, ",".join(sorted(key.scopes)))
        times = (moment(entry.created), moment(key.expires))
        rows.append((*row, str(key.requests_per_minute), *times, state(entry, now)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines if entries else ["There are no keys."])


def state(entry: Entry, now: float) -> str:
    if entry.revoked is not None:
        return f"revoked {moment(entry.revoked)}"
    return "expired" if entry.key.expires is not None and entry.key.expires <= now else "valid"


def moment(seconds: int | None) -> str:
    """A time as people read it."""
    return "never" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
