"""Fine-tune a language model on your own rows: train a LoRA adapter, or all weights.

python finetune.py --data_path rows.json --output_path lora-checkpoints/mine
"""

from onecard.config import options as config_options
from onecard.config import training as config_training

LESS_MEMORY = "--micro_batch_tokens, --cutoff_len or --bits"  # options whose smaller values need less memory


def main(arguments: list[str]) -> None:
    options, explicit = config_options.parse_given(
        config_training.FinetuneConfig, arguments, description=__doc__
    )
    from onecard.inference import chat  # imported late, because --help needs no torch
    from onecard.training import loop, metrics

    loop.run(options, chat.reply, metrics.loss_curve, explicit)
