"""Continue a run exactly where it stopped, or train its result further on other rows.

python finetune_continue.py --output_path lora-checkpoints/mine
python finetune_continue.py --resume_from_checkpoint lora-checkpoints/mine/checkpoint-400
python finetune_continue.py --resume_from_checkpoint DIR --data_path other.json --output_path NEW
"""

from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config import training as config_training

SETTINGS = config_training.ContinueConfig  # the class of its options
# options whose smaller values need less memory
LESS_MEMORY = declaration.memory_savers(SETTINGS, rules=[declaration.OnResume.FREE])


def main(arguments: list[str]) -> None:
    options, explicit = config_options.parse_given(SETTINGS, arguments, description=__doc__)
    from onecard.inference import chat  # imported late, because --help needs no torch
    from onecard.training import loop, metrics

    loop.go_on(options, explicit, chat.reply, metrics.loss_curve)
