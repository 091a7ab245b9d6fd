"""Merge a LoRA adapter into its 16-bit base model, shard by shard: the model is never loaded.

python tools/merge_lora.py --lora_path lora-checkpoints/demo --output_path demo-merged
python tools/merge_lora.py --model_path MODEL --lora_path ADAPTER --output_path NEW --report
"""

from onecard import parsing
from onecard.errors import UserError
from onecard.tool_config import MergeConfig

LESS_MEMORY = ""  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options = parsing.parse(MergeConfig, arguments, description=__doc__)
    if not options.lora_path or not options.output_path:
        raise UserError("--lora_path and --output_path are needed.", "See --help.")
    from onecard import bars, hub, merge, merge_report  # after the options, so that --help needs no torch

    with bars.over_bytes("merging") as (say, progress):

        def report(*merged) -> None:
            merge_report.run(options, *merged, say)

        then = report if options.report else None
        merge.run(options, hub.fetch_model, hub.fetch_adapter, say, progress, then)
