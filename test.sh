#!/usr/bin/env bash
# Set up what the tests need, check the types, and run two test files at a time. Arguments go to pytest instead.
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh test
if [ $# = 0 ]; then
  .venv/bin/python -m mypy # checks the files that pyproject.toml lists
  set -- -n 2 --dist loadfile --no-loadscope-reorder # tests/conftest.py puts long files first
fi
exec .venv/bin/python -m pytest "$@"
