#!/usr/bin/env bash
# One instruction, one answer, in a browser. Without arguments it takes the demo model with the adapter that
# finetune.sh trained, if there is one.
#
#   BASE_MODEL=huggyllama/llama-7b LORA_PATH=lora-checkpoints/mine bash generate.sh --load_8bit
#
# BASE_MODEL or MODEL_PATH: the base model (default: the one the adapter was trained on). LORA_PATH: an adapter, a
# run or a hub name. USE_LOCAL=1: download nothing from the hub. All other arguments go to generate.py.
set -euo pipefail
home=$(dirname "$(readlink -f "$0")") # the program runs in the user's folder, to which all relative paths belong
bash "$home/tools/setup.sh" chat
source "$home/tools/launch.sh"
chat_options "$@"
exec "$home/.venv/bin/python" "$home/generate.py" ${arguments[@]+"${arguments[@]}"} "$@"
