#!/usr/bin/env bash
# The chat window, under the name that users of Alpaca-LoRA-Serve know. interaction.sh describes its variables.
set -euo pipefail
exec bash "$(dirname "$(readlink -f "$0")")/interaction.sh" "$@"
