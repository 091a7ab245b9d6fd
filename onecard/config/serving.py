"""The options of the HTTP service and of its keys.

This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses
import re

from onecard.config import chat as config_chat
from onecard.config.chat import WINDOW, ChatConfig
from onecard.config.checks import at_least, between
from onecard.config.declaration import EXECUTION, NO_UNIT, Use, inherited, option
from onecard.config.generation import SEVERAL_TURNS
from onecard.config.options import refuse_unused
from onecard.errors import UserError

ADMIN, CHAT, JOBS, KNOWLEDGE = "admin", "chat", "jobs", "knowledge"
SCOPES = (ADMIN, CHAT, JOBS, KNOWLEDGE)
CREATE, LIST, REVOKE, ROTATE = "create", "list", "revoke", "rotate"
REQUESTS_PER_MINUTE = 600  # of a key that nobody has given a number
PERIOD = re.compile(r"([1-9]\d{0,4})([mhdw])")
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}
LONGEST = 3650 * SECONDS["d"]  # of a period

CREATING = Use(("for create", ""))
NEW_SECRET = Use(("for create and rotate", ""))
NAMED = Use(("not for list", ""))


def seconds_of(period: str) -> int | None:
    """The seconds of a period such as 30d or 12h; None for a text that is no period of at most ten years."""
    match = PERIOD.fullmatch(period)
    seconds = int(match[1]) * SECONDS[match[2]] if match else None
    return None if seconds is None or seconds > LONGEST else seconds


def scopes_of(text: str) -> list[str]:
    """The scopes that a text names, separated by commas."""
    return [scope.strip() for scope in text.split(",")]


def period(value: str) -> str | None:
    return None if seconds_of(value) else "must be a number and m, h, d or w, such as 30d, at most 3650d"


def scopes(value: str) -> str | None:
    wrong = [scope for scope in scopes_of(value) if scope not in SCOPES]
    return f"has to name some of {', '.join(SCOPES)}, not {wrong[0]!r}" if wrong else None


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    """Options of serve/keys.py."""

    action: str = option(
        LIST,
        EXECUTION,
        "create a key and show it once, list all keys, revoke one for good, or rotate one: it gets a new "
        "text, and the old one is invalid at once",
        choices=(CREATE, LIST, REVOKE, ROTATE),
        positional=True,
    )
    name: str | None = option(
        None, EXECUTION, "name of the key; for revoke and rotate also its id", positional=True, only=(NAMED,)
    )
    owner: str | None = option(
        None,
        EXECUTION,
        "to whom everything that is made with the key belongs; keys with one owner share it; none: the name",
        only=(CREATING,),
    )
    scopes: str = option(
        "chat",
        EXECUTION,
        "what the key may do: some of chat, jobs, knowledge and admin, separated by commas",
        check=scopes,
        only=(CREATING,),
    )
    expires: str | None = option(
        None,
        EXECUTION,
        "after which time the key is invalid: 12h, 30d or 8w, say; none: never, or for rotate as before",
        check=period,
        only=(NEW_SECRET,),
    )
    requests_per_minute: int = option(
        REQUESTS_PER_MINUTE,
        EXECUTION,
        "most requests of the key in a minute; further ones are refused until there is room",
        unit=("requests", "次请求"),
        check=at_least(1),
        only=(CREATING,),
    )
    data_dir: str | None = option(
        None,
        EXECUTION,
        "data folder of the service, with its keys and files; none: the folder onecard/serve where this "
        "system keeps the data of users, such as ~/.local/share",
    )


def check_used(options: KeysConfig) -> None:
    """Raise UserError for options that the action does not use and that ask for something."""
    absent = [CREATING] if options.action != CREATE else []
    absent += [NEW_SECRET] if options.action not in (CREATE, ROTATE) else []
    absent += [NAMED] if options.action == LIST else []
    refuse_unused(options, *absent)


@dataclasses.dataclass(frozen=True)
class ServeConfig(ChatConfig):
    """Options of serve/app.py. Those of an answer hold for TigerBot's call, which names none itself."""

    host: str = option(
        "127.0.0.1",
        EXECUTION,
        "address to listen at; one that other machines can reach needs --allow_remote",
    )
    port: int = option(8000, EXECUTION, "port to listen at", unit=NO_UNIT, check=between(1, 65535))
    allow_remote: bool = option(
        False,
        EXECUTION,
        "listen at an address that other machines can reach; each call needs a key there too",
    )
    data_dir: str | None = inherited(KeysConfig, "data_dir")
    at_once: int = option(
        4,
        EXECUTION,
        "answers that are computed together; each takes the memory of a whole context",
        unit=("requests", "次请求"),
        check=between(1, 256),
    )
    max_queue: int = option(
        32,
        EXECUTION,
        "requests that may wait; further ones are refused until there is room",
        unit=("requests", "次请求"),
        check=at_least(0),
    )
    drain_seconds: int = option(
        20,
        EXECUTION,
        "time that running requests get when the service is stopped",
        unit=("seconds", "秒"),
        check=at_least(0),
    )
    log_prompts: bool = option(False, EXECUTION, "write what callers ask to the log")
    origin: str | None = option(
        None, EXECUTION, "address of a page elsewhere that may call the service, such as https://..."
    )


def check_served(options: ServeConfig) -> None:
    """Raise UserError for options that the service does not use and that ask for something."""
    config_chat.check_used(options, WINDOW, SEVERAL_TURNS)
    if options.terminal:
        raise UserError("--terminal: the service has no terminal to talk in.", "Leave the option out.")
