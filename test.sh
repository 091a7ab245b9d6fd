#!/usr/bin/env bash
# Set up what the tests need, check types, run the tests two at a time; with arguments: pytest with these.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh test
if [ $# = 0 ]; then
  .venv/bin/python -m mypy # of the files that pyproject.toml names
  set -- -n 2 --dist loadfile --no-loadscope-reorder # tests/conftest.py puts the long ones first
fi
exec .venv/bin/python -m pytest "$@"
