"""Fetch a model, verified: resumed after a cut, every checksum compared, its commit written down.

python tools/download.py demo
python tools/download.py owner/model --to models/mine
python tools/download.py --url_list addresses.txt --to llama/7B
"""

from onecard.config import options as config_options
from onecard.config import tools as tool_config

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = config_options.parse(tool_config.DownloadConfig, arguments, description=__doc__)
    from onecard.hub import download  # after the options: --help needs no network library
    from onecard.system.console import say

    folder = download.run(options)
    named = options.model_path if options.model_path and not options.to else folder
    say(f"It is in {folder}." + ("" if options.url_list else f" Use it with --model_path {named}"))
