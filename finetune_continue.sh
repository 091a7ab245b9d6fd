#!/usr/bin/env bash
# Continue a run exactly where it stopped.
#
#   OUTPUT_PATH=lora-checkpoints/mine bash finetune_continue.sh
#   LORA_CHECKPOINT=lora-checkpoints/mine/checkpoint-400 FROM_DATA_BEGINNING=true bash finetune_continue.sh
#
# OUTPUT_PATH: the run (default: that of the demo), which continues from its newest intact checkpoint.
# LORA_CHECKPOINT: another checkpoint. FROM_DATA_BEGINNING=true: start at the first row again. TOT_CUDA and PORT: as in
# finetune.sh. All other arguments go to finetune_continue.py; see finetune_continue.py --help.
set -euo pipefail
home=$(dirname "$(readlink -f "$0")") # the program runs in the user's folder, to which all relative paths belong
bash "$home/tools/setup.sh" train
source "$home/tools/launch.sh"

option --output_path "${OUTPUT_PATH:-}"
option --resume_from_checkpoint "${LORA_CHECKPOINT:-}"
option --from_data_beginning "${FROM_DATA_BEGINNING:-}"
launch finetune_continue.py "$@"
