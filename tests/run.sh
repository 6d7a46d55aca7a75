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

# Files side by side: these tests wait for each other's processors no longer than for their own. The long ones measure
# times that the product promises (a hang is noticed in 90 s), so they have the machine to themselves.
code=0
tests() {
    local ended=0
    python -m pytest --durations=10 "$@" || ended=$?
    [ "$ended" = 0 ] || [ "$ended" = 5 ] || code=$ended # 5: none were selected
}
say "tests"
tests -n 2 --dist loadfile -m "not long" "$@"
if [ "$long" ]; then
    say "long tests"
    tests -m long "$@"
fi
say "tests ended with exit code $code"
exit "$code"
