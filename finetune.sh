#!/usr/bin/env bash
# Fine-tune a model on your rows. Without arguments it trains the demo model on sample/instruct.json.
#
#   TOT_CUDA="0,1" DATA_PATH=rows.json OUTPUT_PATH=lora-checkpoints/mine MODEL_PATH=huggyllama/llama-7b \
#   TEST_SIZE=200 bash finetune.sh --num_epochs 1
#
# TOT_CUDA: the GPUs to use. With several, torchrun starts one process per GPU, and PORT is where they meet.
# Without TOT_CUDA all GPUs are visible and the first is used. All other arguments go to finetune.py; see
# finetune.py --help.
set -euo pipefail
home=$(dirname "$(readlink -f "$0")") # the program runs in the user's folder, to which all relative paths belong
bash "$home/tools/setup.sh" train
source "$home/tools/launch.sh"

# the demo's own learning rate and length: about 40,000 tokens change the form of the answers; later flags override
case "${DATA_PATH:+set}${MODEL_PATH:+set} $* " in
  set* | *" --data_path"* | *" --model_path"* | *" --config"*) ;;
  *) arguments=(--batch_size 16 --num_epochs 2 --learning_rate 3e-3 --eval_steps 13) ;;
esac
option --data_path "${DATA_PATH:-}"
option --output_path "${OUTPUT_PATH:-}"
option --model_path "${MODEL_PATH:-}"
option --test_size "${TEST_SIZE:-}"
launch finetune.py "$@"
