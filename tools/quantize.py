#!/usr/bin/env python3
"""Make a model smaller: GPTQ, AWQ or bitsandbytes, in the folder that transformers and vLLM load.

python tools/quantize.py --model_path demo
python tools/quantize.py --model_path MODEL --bits 3 --group_size 64 --act_order --data_path rows.json
python tools/quantize.py --model_path MODEL --method bnb --bits 8
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from onecard import parsing
from onecard.errors import run_program
from onecard.tool_config import QuantizeConfig


def main() -> None:
    options = parsing.parse(QuantizeConfig, sys.argv[1:], description=__doc__)
    from onecard import gptq, hub  # after the options, so that --help needs no torch

    folder = gptq.run(options, hub.fetch_model, lambda text: print(text, flush=True))
    print(f"The model is in {folder}; talk to it or train on it with --model_path {folder}")


if __name__ == "__main__":
    run_program(main, "--cutoff_len")
