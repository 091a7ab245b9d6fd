#!/usr/bin/env bash
# Serve a model over HTTP at this machine, for programs that speak OpenAI's or TigerBot's calls. Without arguments it
# takes the demo model with the adapter that finetune.sh trained, if there is one.
#
#   BASE_MODEL=huggyllama/llama-7b LORA_PATH=mine=lora-checkpoints/mine bash serve.sh --port 8080
#
# BASE_MODEL or MODEL_PATH: the base model (default: the one the adapter was trained on). LORA_PATH: an adapter, a
# run or a hub name. USE_LOCAL=1: download nothing from the hub. All other arguments go to serve/app.py.
set -euo pipefail
home=$(dirname "$(readlink -f "$0")") # the program runs in the user's folder, to which all relative paths belong
bash "$home/tools/setup.sh" serve
source "$home/tools/launch.sh"
chat_options "$@"
exec "$home/.venv/bin/python" "$home/serve/app.py" ${arguments[@]+"${arguments[@]}"} "$@"
