#!/usr/bin/env bash
# Set up what the tests need and run them; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh test
exec .venv/bin/python -m pytest "$@"
