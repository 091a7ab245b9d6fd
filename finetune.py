#!/usr/bin/env python3
"""Fine-tune a language model on your own rows with a LoRA adapter, or all its weights.

python finetune.py --data_path rows.json --output_path lora-checkpoints/mine
"""

import sys

from onecard import config
from onecard.errors import run_program


def main() -> None:
    options, given = config.parse_given(config.FinetuneConfig, sys.argv[1:], description=__doc__)
    from onecard import chat, hub, report, train  # after the options, so that --help needs no torch

    work = {"sample": chat.reply, "draw": report.loss_curve, "fetch_data": hub.fetch_dataset}
    train.run(options, hub.locate, fetch=hub.fetch_adapter, given=given, **work)


if __name__ == "__main__":
    run_program(main, "--micro_batch_tokens, --cutoff_len or --bits")
