#!/usr/bin/env bash
# Train further on other rows: adapter, optimizer and learning rate continue, the new rows start at their beginning.
#
#   LORA_CHECKPOINT=lora-checkpoints/mine DATA_PATH=other.json OUTPUT_PATH=lora-checkpoints/both \
#   bash finetune_others_continue.sh
#
# LORA_CHECKPOINT: a run, one of its checkpoints, or the folder of an adapter (then only its weights are used).
# LORA_REMOTE_CHECKPOINT: the hub name of an adapter, and MODEL_PATH: its base model. OUTPUT_PATH: a new folder.
# TOT_CUDA and PORT: as in finetune.sh. All other arguments go to finetune_continue.py; see
# finetune_continue.py --help.
set -euo pipefail
home=$(dirname "$(readlink -f "$0")") # the program runs in the user's folder, to which all relative paths belong
bash "$home/tools/setup.sh" train
source "$home/tools/launch.sh"

option --resume_from_checkpoint "${LORA_CHECKPOINT:-}"
option --lora_remote_checkpoint "${LORA_REMOTE_CHECKPOINT:-}"
option --data_path "${DATA_PATH:-}"
option --model_path "${MODEL_PATH:-}"
option --output_path "${OUTPUT_PATH:-}"
launch finetune_continue.py "$@"
