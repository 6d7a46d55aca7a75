#!/usr/bin/env bash
# From a fresh machine to tested: set up if needed, check the style, run all tests that this machine can run.
# Options after the script's name go to pytest, for example: bash tests/run.sh -k reader
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

start=$(date +%s)
say() { printf '[%4d s] %s\n' "$(($(date +%s) - start))" "$*"; }

bash slurm/install.sh --extras test,plots,export
. slurm/activate.sh

say "style"
python -m ruff check .
python -m ruff format --check .

say "tests"
code=0
python -m pytest --durations=15 "$@" || code=$?
say "tests ended with exit code $code"
exit "$code"
