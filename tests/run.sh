#!/usr/bin/env bash
# From a fresh machine to tested: set up if needed, check the style, run the tests.
#   bash tests/run.sh          the tests that take seconds: at most 10 minutes on two cores
#   bash tests/run.sh --all    the long ones too (real Slurm, faults, elastic training, fuzzing): what CI runs
# Other options go to pytest, for example: bash tests/run.sh -k reader
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

long=
if [ "${1:-}" = --all ]; then long=1 && shift; fi

start=$(date +%s)
say() { printf '[%4d s] %s\n' "$(($(date +%s) - start))" "$*"; }

bash slurm/install.sh --extras test,plots,export
. slurm/activate.sh

say "style"
python -m ruff check .
python -m ruff format --check .

# Two files of tests at a time, in the order of their names: most of them wait for processes. Those marked "alone"
# (tests/conftest.py) run one by one.
code=0
tests() {
    local ended=0
    python -m pytest --durations=10 "$@" || ended=$?
    [ "$ended" = 0 ] || [ "$ended" = 5 ] || code=$ended # 5: none were selected
}
say "tests"
if [ "$long" ]; then
    tests -n 2 --dist loadfile --no-loadscope-reorder -m "not alone" "$@"
    say "tests that have the machine to themselves"
    tests -m alone "$@"
else
    tests -n 2 --dist loadfile --no-loadscope-reorder -m "not long" "$@"
fi
say "tests ended with exit code $code"
exit "$code"
