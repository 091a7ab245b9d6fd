#!/usr/bin/env python3
"""JSON, JSONL or CSV rows -> one Parquet file, in pieces, so that the file may be larger than memory.

python tools/json_to_parquet.py --data_path rows.jsonl --output_path rows.parquet
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard import config
from onecard.errors import run_program


def main() -> None:
    options = config.parse(config.ParquetConfig, sys.argv[1:], description=__doc__)
    from onecard import reader, tables

    paths = [source.path for source in reader.sources(options.data_path)]
    count, columns = tables.write_parquet(paths, reader.values, Path(options.output_path))
    print(f"{count} rows with the columns {', '.join(columns)} are in {options.output_path}.")


if __name__ == "__main__":
    run_program(main)
