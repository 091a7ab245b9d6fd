#!/usr/bin/env bash
# A model learns new words in stages: vocabulary -> its embeddings -> raw text -> answers. Every stage goes on
# with the weights of the one before; run it again after a stop, what is finished is not done twice.
#
#   MODEL_PATH=demo OUTPUT_PATH=lora-checkpoints/stages bash sample/stages.sh --max_steps 40
#
# Everything after the name goes to all three trainings (see finetune.py --help); a stage that goes on keeps
# the options it began with.
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup.sh train
model=${MODEL_PATH:-demo} folder=${OUTPUT_PATH:-lora-checkpoints/stages}

# stage NAME OPTIONS...: a training in a folder of its own; one that was stopped goes on
stage() {
  local run=$folder/$1 fresh=true # a run that was killed before its first save is started anew
  shift
  [ -e "$run/finished.json" ] && fresh=false
  if compgen -G "$run/checkpoint-*" >/dev/null && [ ! -e "$run/finished.json" ]; then
    .venv/bin/python finetune_continue.py --output_path "$run"
  else
    .venv/bin/python finetune.py --model_path "$folder/base" --template chatml --output_path "$run" "$@" --overwrite "$fresh"
  fi
}

[ -d "$folder/tokenizer" ] ||
  .venv/bin/python tools/extend_vocab.py --model_path "$model" --pieces sample/pieces.txt --output_path "$folder/tokenizer"
[ -d "$folder/base" ] ||
  .venv/bin/python tools/prepare_base_model.py --model_path "$model" --tokenizer_path "$folder/tokenizer" --output_path "$folder/base"
stage embed --data_path sample/text.jsonl --train_what embeddings "$@"
stage pretrain --data_path sample/text.jsonl --train_what lora+embeddings --lora_path "$folder/embed" "$@"
stage sft --data_path sample/instruct.json --train_what lora+embeddings --lora_path "$folder/pretrain" "$@"
