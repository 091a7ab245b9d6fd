"""Download a model. Interrupted downloads resume, checksums are compared, and the commit is recorded.

python tools/download.py demo
python tools/download.py owner/model --to models/mine
python tools/download.py --url_list addresses.txt --to llama/7B
"""

from onecard.config import options as config_options
from onecard.config import tools as config_tools

SETTINGS = config_tools.DownloadConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.hub import download  # imported late, because --help needs no network library
    from onecard.system.console import say

    folder = download.run(options)
    name = options.model_path if options.model_path and not options.to else folder
    use = "" if options.url_list else f" Use it with --model_path {name}"
    say(f"The download is in {folder}.{use}")
