#!/usr/bin/env bash
# Talk in this terminal, on the processor alone, through llama.cpp. Without arguments: the demo model with the
# adapter that finetune.sh trained, if there is one. Both are exported to GGUF when that has not been done.
#
#   BASE_MODEL=huggyllama/llama-7b LORA_PATH=lora-checkpoints/mine bash cpu_chat.sh --temperature 0.3
#
# BASE_MODEL or MODEL_PATH: the base model (unset: the one the adapter was trained on); LORA_PATH: adapter, run
# or hub name; USE_LOCAL=1: fetch nothing from the hub. Everything after the name goes to tools/cpu_chat.py.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh cpu
source tools/launch.sh
chat_options "$@"
exec .venv/bin/python tools/cpu_chat.py ${arguments[@]+"${arguments[@]}"} "$@"
