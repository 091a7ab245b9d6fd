"""Fine-tune a language model on your own rows: train a LoRA adapter, or all weights.

python finetune.py --data_path rows.json --output_path lora-checkpoints/mine
"""

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config import training as config_training

SETTINGS = config_training.FinetuneConfig  # the class of its options
# options whose smaller values need less memory
LESS_MEMORY = declaration.memory_savers(SETTINGS)


def main(arguments: list[str]) -> None:
    options, explicit = config_options.parse_given(SETTINGS, arguments, description=__doc__)
    from onecard.inference import chat  # imported late, because --help needs no torch
    from onecard.training import loop, metrics

    loop.run(options, chat.reply, metrics.loss_curve, explicit)
