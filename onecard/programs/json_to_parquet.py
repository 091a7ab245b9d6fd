"""Convert JSON, JSONL or CSV rows to one Parquet file, piece by piece: files may be larger than the memory.

python tools/json_to_parquet.py --data_path rows.jsonl --output_path rows.parquet
"""

from pathlib import Path

from onecard.config import options as config_options
from onecard.config import tools as config_tools

SETTINGS = config_tools.ParquetConfig  # the class of its options
LESS_MEMORY = ""  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    from onecard.data import reader, tables
    from onecard.system.console import say

    paths = [source.path for source in reader.locate_files(options.data_path)]
    count, columns = tables.write_parquet(paths, reader.values, Path(options.output_path))
    say(f"{count} rows with the columns {', '.join(columns)} were written to {options.output_path}.")
