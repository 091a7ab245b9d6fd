#!/usr/bin/env bash
# A model learns new words in stages: vocabulary -> its embeddings -> raw text -> answers. Every stage starts from the
# weights of the one before. Run it again after a stop: finished stages are not repeated.
#
#   MODEL_PATH=demo OUTPUT_PATH=lora-checkpoints/stages bash sample/stages.sh --max_steps 40
#
# All arguments go to all three trainings (see finetune.py --help). A stage that continues keeps the options that it
# began with.
set -euo pipefail
home=$(dirname "$(dirname "$(readlink -f "$0")")") # all relative paths belong to the user's folder
bash "$home/tools/setup.sh" train
model=${MODEL_PATH:-demo} folder=${OUTPUT_PATH:-lora-checkpoints/stages}

# stage NAME OPTIONS...: a training in a folder of its own; if it was stopped, it continues
stage() {
  local run=$folder/$1 fresh=true # a run that was killed before its first save starts again
  shift
  [ -e "$run/finished.json" ] && fresh=false
  if compgen -G "$run/checkpoint-*" >/dev/null && [ ! -e "$run/finished.json" ]; then
    "$home/.venv/bin/python" "$home/finetune_continue.py" --output_path "$run"
  else
    "$home/.venv/bin/python" "$home/finetune.py" --model_path "$folder/base" --template chatml --output_path "$run" "$@" --overwrite "$fresh"
  fi
}

[ -d "$folder/tokenizer" ] ||
  "$home/.venv/bin/python" "$home/tools/extend_vocab.py" --model_path "$model" --pieces "$home/sample/pieces.txt" --output_path "$folder/tokenizer"
[ -d "$folder/base" ] ||
  "$home/.venv/bin/python" "$home/tools/prepare_base_model.py" --model_path "$model" --tokenizer_path "$folder/tokenizer" --output_path "$folder/base"
stage embed --data_path sample/text.jsonl --train_what embeddings "$@"
stage pretrain --data_path sample/text.jsonl --train_what lora+embeddings --lora_path "$folder/embed" "$@"
stage sft --data_path sample/instruct.json --train_what lora+embeddings --lora_path "$folder/pretrain" "$@"
