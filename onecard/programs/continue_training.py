"""Go on with a run exactly where it stopped, or train further on other rows.

python finetune_continue.py --output_path lora-checkpoints/mine
python finetune_continue.py --resume_from_checkpoint lora-checkpoints/mine/checkpoint-400
python finetune_continue.py --resume_from_checkpoint DIR --data_path other.json --output_path NEW
"""

from onecard import config

LESS_MEMORY = "--micro_batch_tokens"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    wish, given = config.parse_given(config.ContinueConfig, arguments, description=__doc__)
    from onecard import chat, hub, report, train  # after the options, so that --help needs no torch

    work = {"sample": chat.reply, "draw": report.loss_curve, "fetch_data": hub.fetch_dataset}
    train.go_on(wish, given, hub.locate, hub.fetch_adapter, **work)
