# Sourced by the entries, which are options from the environment and one program.
# TOT_CUDA: the cards to use (several: torchrun, one process each, PORT for their meeting).

arguments=()

# option --name VALUE: one more argument of the program, unless the value is empty
option() {
  if [ -n "$2" ]; then arguments+=("$1" "$2"); fi
}

# launch PROGRAM ARGUMENTS...: replaces the shell by the program, so that signals arrive
launch() {
  local program=$1 processes=1 cards
  shift
  if [ -n "${TOT_CUDA:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$TOT_CUDA
    IFS=, read -ra cards <<<"$TOT_CUDA"
    processes=${#cards[@]}
  fi
  if [ "$processes" -gt 1 ]; then
    exec .venv/bin/python -m torch.distributed.run --nproc_per_node="$processes" \
      --master_port="${PORT:-12345}" "$program" ${arguments[@]+"${arguments[@]}"} "$@"
  fi
  exec .venv/bin/python "$program" ${arguments[@]+"${arguments[@]}"} "$@"
}

# chat_options ARGUMENTS...: base model and adapter from the environment; without either, what finetune.sh made
chat_options() {
  if [ "${USE_LOCAL:-0}" = 1 ]; then export HF_HUB_OFFLINE=1; fi
  case "${LORA_PATH:+set}${MODEL_PATH:+set}${BASE_MODEL:+set} $* " in
    set* | *" --lora_path"* | *" --model_path"* | *" --config"*) ;;
    *) if [ -d lora-checkpoints/demo ]; then LORA_PATH=lora-checkpoints/demo; fi ;;
  esac
  option --model_path "${MODEL_PATH:-${BASE_MODEL:-}}"
  option --lora_path "${LORA_PATH:-}"
}
