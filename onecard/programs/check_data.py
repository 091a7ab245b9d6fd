"""Check rows before training on them: schema, lengths, cut rows, suspicious rows, and the cost of training.

python tools/check_data.py --data_path rows.json
python tools/check_data.py --data_path rows.json --html report.html --png lengths.png
python tools/check_data.py --data_path rows.json --clean clean.jsonl --repair
"""

from onecard.config import options as config_options
from onecard.config import tools as config_tools

SETTINGS = config_tools.CheckConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.data import check, reader  # imported late, because --help needs no package
    from onecard.hub import locate
    from onecard.models import tokenizer as models_tokenizer

    check.check_options(options)
    paths = [source.path for source in reader.locate_files(options.data_path, fetch=locate.fetch_dataset)]
    check.run(options, paths, models_tokenizer.load_tokenizer(locate.locate(options.model_path)))
