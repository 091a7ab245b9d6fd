#!/usr/bin/env bash
# Fetch an original-format LLaMA folder, verified by its own MD5 lists, with the address that its licence gave you.
#
#   PRESIGNED_URL='https://.../*?Policy=...' bash tools/download_llama.sh 7B llama/7B
#   BASE_URL=https://my.server/llama         bash tools/download_llama.sh 13B llama/13B
#
# SIZE: 7B, 13B, 30B or 65B. PRESIGNED_URL: from the mail, with * where the file's name goes; BASE_URL: a server with
# the same layout (tokenizer.model, 7B/params.json ...). DIR gets tokenizer.model, params.json, consolidated.0x.pth and
# the checksums. Cut short, the same line goes on.
set -euo pipefail
home=$(cd "$(dirname "$0")/.." && pwd)
size=${1:-} target=${2:-}
case "$size" in
  7B) shards=1 ;; 13B) shards=2 ;; 30B) shards=4 ;; 65B) shards=8 ;;
  *) echo "error: size '$size'. Use: bash tools/download_llama.sh 7B|13B|30B|65B DIR" >&2; exit 2 ;;
esac
[ -n "$target" ] || { echo "error: where to? Use: bash tools/download_llama.sh $size DIR" >&2; exit 2; }
pattern=${PRESIGNED_URL:-${BASE_URL:+${BASE_URL%/}/*}}
case "$pattern" in
  *'*'*) ;;
  '') echo "error: set PRESIGNED_URL to the address you were given, or BASE_URL to your own server." >&2; exit 2 ;;
  *) echo "error: PRESIGNED_URL has no * where the file's name goes." >&2; exit 2 ;;
esac
line() { printf '%s%s%s %s\n' "${pattern%%\**}" "$1" "${pattern#*\*}" "${1#"$size/"}"; }
python=${PYTHON:-"$home/.venv/bin/python"}
[ -n "${PYTHON:-}" ] || bash "$home/tools/setup.sh" train
{
  line tokenizer.model
  line tokenizer_checklist.chk
  line "$size/checklist.chk"
  line "$size/params.json"
  for ((shard = 0; shard < shards; shard++)); do line "$size/consolidated.0$shard.pth"; done
} | "$python" "$home/tools/download.py" --url_list - --to "$target" "${@:3}"
