"""Fetch a model, verified: resumed after a cut, every checksum compared, its commit written down.

python tools/download.py demo
python tools/download.py owner/model --to models/mine
python tools/download.py --url_list addresses.txt --to llama/7B
"""

import sys
from pathlib import Path

from onecard.config import options as config_options
from onecard.config import tools as tool_config
from onecard.errors import UserError

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(tool_config.DownloadConfig, arguments, description=__doc__)
    from onecard.hub import (
        download,
        locate,  # after the options: --help needs no network library
    )

    folder = download.run(options, locate.locate, lines(options.url_list))
    named = options.model_path if options.model_path and not options.to else folder
    print(f"It is in {folder}." + ("" if options.url_list else f" Use it with --model_path {named}"))


def lines(path: str | None) -> list[str]:
    """Lines of the list, [] without one."""
    if path is None:
        return []
    try:
        return (sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--url_list {path}: cannot be read ({error}).", "Name a text file.") from None
