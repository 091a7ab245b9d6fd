"""The one file of a package that pip downloads: its version, and its hash where one is known.

pip compares the hash before it looks into the file, whose code it may run to learn what an archive needs.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

OTHER = "the package index has another file than the one whose hash OneCard knows"


class FetchError(Exception):
    """pip could not download the file, or it has another hash; the text is pip's whole output."""

    @property
    def is_other_file(self) -> bool:
        return "DO NOT MATCH THE HASHES" in str(self)


def fetch(pin: str, sha256: str | None, folder: Path, options: Sequence[str] = ()) -> Path:
    """Download the file of a version, such as `name==1.0`, into a folder, without the packages it needs.

    sha256: in hexadecimal digits; None checks the version alone. options: further ones of `pip download`.
    Raises FetchError.
    """
    listed = folder / "requirements.txt"
    line = [pin, f"--hash=sha256:{sha256}"] if sha256 else [pin]
    listed.write_text(" ".join(line) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*options, "--dest", str(folder), "-r", str(listed)]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    files = [path for pattern in ("*.whl", "*.tar.gz") for path in folder.glob(pattern)]
    if ended.returncode or not files:
        raise FetchError(ended.stderr)
    return files[0]
