"""Print requirements-hashes.txt: every file of the pinned versions, so that a set-up accepts no other.

    .venv/bin/python -m tests.support.hashes INDEX [FOLDER ...] > requirements-hashes.txt

INDEX: the address of a package index that answers in JSON (PEP 691). FOLDER: one with further files of these
versions, such as builds of torch for the CPU. Run it when requirements.txt or requirements-cuda.txt changes.
"""

import hashlib
import json
import re
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

from tests.support.paths import ROOT

PINNED = ("requirements.txt", "requirements-cuda.txt")
HEADER = """# The files of the versions in requirements.txt and requirements-cuda.txt, for all platforms.
# tools/setup.sh installs no others. This list was written by tests/support/hashes.py, which says how.
"""
SUM = re.compile(r"--hash=sha256:([0-9a-f]{64})")
JSON = "application/vnd.pypi.simple.v1+json"


def pins(folder: Path = ROOT) -> list[Requirement]:
    """What both files pin, sorted by name, without options for pip."""
    lines = [line for file in PINNED for line in (folder / file).read_text(encoding="utf-8").splitlines()]
    pinned = [Requirement(line.partition(" --")[0]) for line in lines if line and not line.startswith("#")]
    return sorted(pinned, key=lambda pin: canonicalize_name(pin.name))


def entries() -> dict[str, list[str]]:
    """The hashes of each line of requirements-hashes.txt."""
    text = (ROOT / "requirements-hashes.txt").read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {line.partition(" --hash")[0].strip(): SUM.findall(line) for line in lines}


def version_of(file: str) -> tuple[str, Version] | None:
    """The package and version of a wheel or sdist by its name; None for another kind of file."""
    try:
        return (parse_wheel_filename if file.endswith(".whl") else parse_sdist_filename)(file)[:2]
    except ValueError:
        return None


def belongs(file: str, pin: Requirement) -> bool:
    """Whether a file has the pinned version; the CPU build 2.13.0+cpu belongs to 2.13.0."""
    named = version_of(file)
    return named is not None and named[0] == canonicalize_name(pin.name) and pin.specifier.contains(named[1])


def hashes_of_index(index: str, pin: Requirement) -> set[str]:
    """The SHA-256 sums of the files that an index has of a version. Raises OSError without an answer."""
    address = f"{index.rstrip('/')}/{canonicalize_name(pin.name)}/"
    request = urllib.request.Request(address, headers={"Accept": JSON})
    with urllib.request.urlopen(request, timeout=120) as answer:
        files = json.load(answer)["files"]
    return {file["hashes"]["sha256"] for file in files if belongs(file["filename"], pin)}


def hashes_of_folder(folder: Path, pin: Requirement) -> Iterator[str]:
    """The SHA-256 sums of the files of a version in a folder."""
    for path in folder.iterdir():
        if belongs(path.name, pin):
            with open(path, "rb") as file:
                yield hashlib.file_digest(file, "sha256").hexdigest()


def listed(index: str, folders: list[Path], pin: Requirement) -> str:
    """One requirement with its hashes, as pip reads it. Raises ValueError for a version without a file.

    Comments before it name the files of the folders, so that tools/setup.sh knows which builds have a hash.
    """
    hashes = hashes_of_index(index, pin).union(*(hashes_of_folder(folder, pin) for folder in folders))
    if not hashes:
        raise ValueError(f"no file of {pin} was found")
    names = sorted(path.name for folder in folders for path in folder.iterdir() if belongs(path.name, pin))
    lines = [str(pin), *(f"--hash=sha256:{each}" for each in sorted(hashes))]
    return "".join(f"# {name}\n" for name in names) + " \\\n    ".join(lines) + "\n"


def main(index: str, *folders: str) -> None:
    """Print the whole file."""
    with ThreadPoolExecutor(4) as pool:
        entries = pool.map(lambda pin: listed(index, [Path(each) for each in folders], pin), pins())
        sys.stdout.write(HEADER + "".join(entries))


if __name__ == "__main__":
    main(*sys.argv[1:])
