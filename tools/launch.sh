# The shell scripts at the root source this file: it turns environment variables into options and starts a program of the
# folder $home in the user's folder.
# TOT_CUDA: the GPUs to use. With several, torchrun starts one process per GPU, and PORT is where they meet.

arguments=()

# option --name VALUE: add an argument for the program, unless the value is empty
option() {
  if [ -n "$2" ]; then arguments+=("$1" "$2"); fi
}

# launch PROGRAM ARGUMENTS...: replace the shell with the program, so that signals reach it
launch() {
  local program=$1 processes=1 gpus
  shift
  if [ -n "${TOT_CUDA:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$TOT_CUDA
    IFS=, read -ra gpus <<<"$TOT_CUDA"
    processes=${#gpus[@]}
  fi
  if [ "$processes" -gt 1 ]; then
    # -P keeps Python from importing a file of the user's folder in place of a library
    exec "$home/.venv/bin/python" -P -m torch.distributed.run --nproc_per_node="$processes" \
      --master_port="${PORT:-12345}" "$home/$program" ${arguments[@]+"${arguments[@]}"} "$@"
  fi
  exec "$home/.venv/bin/python" "$home/$program" ${arguments[@]+"${arguments[@]}"} "$@"
}

# chat_options ARGUMENTS...: base model and adapter from the environment; without both, the adapter of finetune.sh
chat_options() {
  if [ "${USE_LOCAL:-0}" = 1 ]; then export HF_HUB_OFFLINE=1; fi
  case "${LORA_PATH:+set}${MODEL_PATH:+set}${BASE_MODEL:+set} $* " in
    set* | *" --lora_path"* | *" --model_path"* | *" --config"*) ;;
    *)
      for demo in lora-checkpoints/demo "$home/lora-checkpoints/demo"; do
        if [ -d "$demo" ]; then LORA_PATH=$demo && break; fi
      done
      ;;
  esac
  option --model_path "${MODEL_PATH:-${BASE_MODEL:-}}"
  option --lora_path "${LORA_PATH:-}"
}
