#!/usr/bin/env bash
# Set up what the tests need and run them, two files at a time; with arguments: pytest with these.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh test
[ $# = 0 ] && set -- -n 2 --dist loadfile --no-loadscope-reorder # tests/conftest.py puts the long ones first
exec .venv/bin/python -m pytest "$@"
