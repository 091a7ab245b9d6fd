#!/usr/bin/env bash
# Download a LLaMA folder in the original format with the address that came with your licence, and verify it with its
# own MD5 lists.
#
#   PRESIGNED_URL='https://.../*?Policy=...' bash tools/download_llama.sh 7B llama/7B
#   BASE_URL=https://my.server/llama         bash tools/download_llama.sh 13B llama/13B
#
# The arguments are the size (7B, 13B, 30B or 65B) and the folder for tokenizer.model, params.json, consolidated.0x.pth
# and the checksums. PRESIGNED_URL: the address from the mail, with * in place of the name of a file. BASE_URL: a server
# with the same layout (tokenizer.model, 7B/params.json ...). An interrupted download continues with the same command.
set -euo pipefail
home=$(dirname "$(dirname "$(readlink -f "$0")")")
size=${1:-} target=${2:-}
case "$size" in
  7B) shards=1 ;; 13B) shards=2 ;; 30B) shards=4 ;; 65B) shards=8 ;;
  *) echo "error: there is no size '$size'. Use: bash tools/download_llama.sh 7B|13B|30B|65B DIR" >&2; exit 2 ;;
esac
[ -n "$target" ] || { echo "error: the folder for the download is missing. Use: bash tools/download_llama.sh $size DIR" >&2; exit 2; }
pattern=${PRESIGNED_URL:-${BASE_URL:+${BASE_URL%/}/*}}
case "$pattern" in
  *'*'*) ;;
  '') echo "error: there is no address. Set PRESIGNED_URL to the address from the mail, or BASE_URL to your own server." >&2; exit 2 ;;
  *) echo "error: PRESIGNED_URL contains no *. Write a * in place of the name of the file." >&2; exit 2 ;;
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
