#!/usr/bin/env bash
# Train further on other rows: adapter, optimizer and rate go on, the new rows start from their beginning.
#
#   LORA_CHECKPOINT=lora-checkpoints/mine DATA_PATH=other.json OUTPUT_PATH=lora-checkpoints/both \
#   bash finetune_others_continue.sh
#
# LORA_CHECKPOINT: a run, one of its checkpoints, or an adapter folder (then only its weights are taken);
# LORA_REMOTE_CHECKPOINT: an adapter's name on the hub, MODEL_PATH its base. OUTPUT_PATH: a new folder. TOT_CUDA and PORT: as in
# finetune.sh. Everything after the name goes to finetune_continue.py; see finetune_continue.py --help.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh train
source tools/launch.sh

option --resume_from_checkpoint "${LORA_CHECKPOINT:-}"
option --lora_remote_checkpoint "${LORA_REMOTE_CHECKPOINT:-}"
option --data_path "${DATA_PATH:-}"
option --model_path "${MODEL_PATH:-}"
option --output_path "${OUTPUT_PATH:-}"
launch finetune_continue.py "$@"
