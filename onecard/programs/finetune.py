"""Fine-tune a language model on your own rows with a LoRA adapter, or all its weights.

python finetune.py --data_path rows.json --output_path lora-checkpoints/mine
"""

from onecard.config import options as config_options
from onecard.config import training as training_config

LESS_MEMORY = "--micro_batch_tokens, --cutoff_len or --bits"  # options that need less memory with less


def main(arguments: list[str]) -> None:
    options, given = config_options.parse_given(
        training_config.FinetuneConfig, arguments, description=__doc__
    )
    from onecard.inference import chat  # after the options, so that --help needs no torch
    from onecard.training import loop, metrics

    loop.run(options, chat.reply, metrics.loss_curve, given)
