#!/usr/bin/env python3
"""What many rows cost: the time to read and encode them once, the time to find them again, and memory.

    .venv/bin/python benchmarks/rows.py [--rows 1000000]

It writes the sample rows, numbered so that all are different, into a JSONL file and encodes them with the
demo model's tokenizer in one process. Peak memory is that of the whole process, including the tokenizer.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest file")
    args = parser.parse_args()
    from memory_rise import memory_rise  # beside this file

    from onecard.config.training import FinetuneConfig
    from onecard.data import dataset
    from onecard.data import reader as data_reader
    from onecard.data import template as data_template
    from onecard.hub import locate
    from onecard.models import tokenizer as models_tokenizer
    from onecard.system import hardware as system_hardware
    from onecard.training import plan as training_plan

    tokenizer = models_tokenizer.load_tokenizer(locate.locate("demo"))
    form = data_template.load("alpaca", tokenizer)
    versions = ", ".join(f"{name} {version}" for name, version in training_plan.versions().items())
    print(f"{date.today().isoformat()}; {system_hardware.describe_machine()}; {versions}.\n")
    print("| rows | file | tokens | first start | rows/s | second start | memory rises by |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    sample = json.loads((ROOT / "sample" / "instruct.json").read_text(encoding="utf-8"))
    for count in (args.rows // 10, args.rows):
        with tempfile.TemporaryDirectory(prefix="onecard-rows-") as name:
            os.environ["ONECARD_CACHE"] = f"{name}/cache"
            path = Path(name) / "rows.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for number in range(count):
                    row = sample[number % len(sample)]
                    text = f"{row['instruction']} ({number})"
                    file.write(json.dumps({**row, "instruction": text}, ensure_ascii=False) + "\n")
            options, seconds, datasets = FinetuneConfig(data_path=str(path)), [], []

            def start(options: FinetuneConfig = options, datasets: list = datasets) -> None:
                datasets.append(
                    dataset.encode(
                        options, data_reader.locate_files(options.data_path), [form], tokenizer, "demo"
                    )
                )

            started = time.monotonic()
            rise = memory_rise(start)
            seconds.append(time.monotonic() - started)
            started = time.monotonic()
            start()
            seconds.append(time.monotonic() - started)
            tokens = int(datasets[-1].encoding.examples.lengths.sum())
            print(
                f"| {count:,} | {path.stat().st_size >> 20} MiB | {tokens:,} | {seconds[0]:.0f} s "
                f"| {count / seconds[0]:,.0f} | {seconds[1]:.2f} s | {rise >> 20} MiB |",
                flush=True,
            )


if __name__ == "__main__":
    main()
