#!/usr/bin/env bash
# Chat in a browser. Without arguments it takes the demo model with the adapter that finetune.sh trained, if there
# is one.
#
#   BASE_MODEL=huggyllama/llama-7b LORA_PATH=lora-checkpoints/mine bash interaction.sh --load_8bit --lang zh
#
# BASE_MODEL or MODEL_PATH: the base model (default: the one the adapter was trained on). LORA_PATH: an adapter, a
# run or a hub name. USE_LOCAL=1: download nothing from the hub. All other arguments go to interaction.py.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh chat
source tools/launch.sh
chat_options "$@"
exec .venv/bin/python interaction.py ${arguments[@]+"${arguments[@]}"} "$@"
