#!/usr/bin/env bash
# Chat in this terminal, on the CPU alone, through llama.cpp. Without arguments it takes the demo model with the
# adapter that finetune.sh trained, if there is one. Both are exported to GGUF first if necessary.
#
#   BASE_MODEL=huggyllama/llama-7b LORA_PATH=lora-checkpoints/mine bash cpu_chat.sh --temperature 0.3
#
# BASE_MODEL or MODEL_PATH: the base model (default: the one the adapter was trained on). LORA_PATH: an adapter, a
# run or a hub name. USE_LOCAL=1: download nothing from the hub. All other arguments go to tools/cpu_chat.py.
set -euo pipefail
home=$(dirname "$(readlink -f "$0")") # the program runs in the user's folder, to which all relative paths belong
bash "$home/tools/setup.sh" cpu
source "$home/tools/launch.sh"
chat_options "$@"
exec "$home/.venv/bin/python" "$home/tools/cpu_chat.py" ${arguments[@]+"${arguments[@]}"} "$@"
