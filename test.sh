#!/usr/bin/env bash
# Set up what the tests need, check the types, and run two test files at a time.
#
#   bash test.sh          the default tier of the tests
#   bash test.sh --ci     also the second tier: fresh installations, the commands of README.md, sweeps
#   bash test.sh WORDS    pytest with these arguments, without the check of the types
set -euo pipefail
cd "$(dirname "$0")"
bash tools/setup.sh test
if [ "$*" = "" ] || [ "$*" = --ci ]; then
  .venv/bin/python -m mypy # checks the files that pyproject.toml lists
  all=(-n 2 --dist loadfile --no-loadscope-reorder) # tests/conftest.py puts long files first
  [ "$*" = "" ] || all+=(-m "not slow") # in place of the marks in pyproject.toml
  set -- "${all[@]}"
fi
exec .venv/bin/python -m pytest "$@"
