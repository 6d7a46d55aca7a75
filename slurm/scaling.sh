#!/bin/bash
# Run a scaling study on a Slurm cluster: submits one job of slurm/train.sh for each size and repeat, in random order, so
# that they run one after the other:
#     cd REPOSITORY; bash slurm/scaling.sh --nodes 1,2,4,8 --mode strong,weak --data /data/imagenet --study runs/study
# It returns when all jobs are submitted. Call it again with the same options to collect the jobs that have ended and to
# submit those that were interrupted; --wait waits until all have ended. Then: python -m job.scaling report runs/study
# `python -m job.scaling run --help` lists all options. Options of job.train (--recipe, --precision, ...) are passed on.
# Options of sbatch go into one word: --sbatch="--exclusive --time=0:20:00". Settings of the cluster are in slurm/site.sh.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# shellcheck source-path=SCRIPTDIR source=site.sh
source slurm/site.sh || exit 2
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
set -euo pipefail # not earlier, because scripts of modules and of conda fail with it
export RANKS_PER_NODE PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec python -m job.scaling run "$@"
