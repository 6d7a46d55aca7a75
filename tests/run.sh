#!/usr/bin/env bash
# From a fresh machine to tested: set up if needed, check the style, run the tests.
#   bash tests/run.sh          the tests that take seconds: at most 10 minutes on two cores
#   bash tests/run.sh --all    the long ones too (real Slurm, faults, elastic training, fuzzing): what CI runs
# Other options go to pytest, for example: bash tests/run.sh -k reader
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=(-m "not long")
if [ "${1:-}" = --all ]; then which=() && shift; fi

start=$(date +%s)
say() { printf '[%4d s] %s\n' "$(($(date +%s) - start))" "$*"; }

bash slurm/install.sh --extras test,plots,export
. slurm/activate.sh

say "style"
python -m ruff check .
python -m ruff format --check .

say "tests"
code=0
python -m pytest --durations=15 ${which[@]+"${which[@]}"} "$@" || code=$?
say "tests ended with exit code $code"
exit "$code"
