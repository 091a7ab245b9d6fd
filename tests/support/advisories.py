"""Compare the pinned versions with the security advisories in requirements-advisories.json.

    .venv/bin/python -m tests.support.advisories

The file holds records in OSV's format (https://ossf.github.io/osv-schema/) for the pinned packages, and the
date on which it was made. Only what is in the file is compared; docs/safety.md says what that is.
"""

import datetime
import json
from collections.abc import Iterable, Iterator
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support import hashes
from tests.support.paths import ROOT

FILE = ROOT / "requirements-advisories.json"


def read() -> dict[str, Any]:
    """The whole file."""
    content: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return content


def age(content: dict[str, Any], today: datetime.date) -> int:
    """The days since the file was made."""
    return (today - datetime.date.fromisoformat(content["date"])).days


def version(pin: Requirement) -> Version:
    """The version of a requirement NAME==VERSION."""
    (specifier,) = pin.specifier
    return Version(specifier.version)


def is_in(pinned: Version, events: Iterable[dict[str, str]]) -> bool:
    """Whether a version is affected by a range, whose events come in the order of their versions."""
    affected = False
    for event in events:
        ((kind, text),) = event.items()
        if kind == "introduced" and pinned >= Version(text):
            affected = True
        elif (kind == "fixed" and pinned >= Version(text)) or (
            kind == "last_affected" and pinned > Version(text)
        ):
            affected = False
    return affected


def affecting(pins: Iterable[Requirement], records: Iterable[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Each pin and the id of an advisory that affects it."""
    versions = {canonicalize_name(pin.name): version(pin) for pin in pins}
    for record in records:
        for each in record["affected"]:
            pinned = versions.get(canonicalize_name(each["package"]["name"]))
            if pinned and any(is_in(pinned, span["events"]) for span in each["ranges"]):
                yield f"{each['package']['name']}=={pinned}", record["id"]


def main() -> None:
    """Print what affects the pins, and how old the advisories are."""
    content = read()
    today = datetime.datetime.now(tz=datetime.UTC).date()
    print(f"{FILE.name} is {age(content, today)} days old and was made from {content['source']}.")
    for pin, advisory in affecting(hashes.pins(), content["advisories"]):
        judgement = content["accepted"].get(advisory, {"reason": "Nobody has judged this one."})
        print(f"{pin}: {advisory}. {judgement['reason']}")


if __name__ == "__main__":
    main()
