"""Fine-tune a language model on your own rows with a LoRA adapter, or all its weights.

python finetune.py --data_path rows.json --output_path lora-checkpoints/mine
"""

from onecard import config

LESS_MEMORY = "--micro_batch_tokens, --cutoff_len or --bits"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options, given = config.parse_given(config.FinetuneConfig, arguments, description=__doc__)
    from onecard import chat, hub, report, train  # after the options, so that --help needs no torch

    work = {"sample": chat.reply, "draw": report.loss_curve, "fetch_data": hub.fetch_dataset}
    train.run(options, hub.locate, fetch=hub.fetch_adapter, given=given, **work)
