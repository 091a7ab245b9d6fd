# launch PROGRAM ARGUMENTS...: replaces the shell by the program; sourced by the entries.
# TOT_CUDA: the cards to use (several: torchrun, one process each, PORT for their meeting).
launch() {
  local processes=1 cards
  if [ -n "${TOT_CUDA:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$TOT_CUDA
    IFS=, read -ra cards <<<"$TOT_CUDA"
    processes=${#cards[@]}
  fi
  if [ "$processes" -gt 1 ]; then
    exec .venv/bin/python -m torch.distributed.run --nproc_per_node="$processes" \
      --master_port="${PORT:-12345}" "$@"
  fi
  exec .venv/bin/python "$@"
}
