#!/usr/bin/env bash
# The chat window, under the name that users of Alpaca-LoRA-Serve know. interaction.sh describes its variables.
set -euo pipefail
exec bash "$(dirname "$0")/interaction.sh" "$@"
