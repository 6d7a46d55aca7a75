#!/bin/bash
# A scaling study on a Slurm cluster: submits a run of slurm/train.sh for each size and repeat, in random order, one after
# the other:
#     cd REPOSITORY; bash slurm/scaling.sh --nodes 1,2,4,8 --mode strong,weak --data /data/imagenet --study runs/study
# It returns when all are submitted. Call it again with the same options to take in what has ended, and to submit what was
# interrupted; with --wait it stays until all have ended. Then: python -m job.scaling report runs/study
# More options: python -m job.scaling run --help; options of job.train (--recipe, --precision, ...) are passed on; options
# of sbatch go in one word: --sbatch="--exclusive --time=0:20:00". What differs between clusters is in slurm/site.sh.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# shellcheck source-path=SCRIPTDIR source=site.sh
source slurm/site.sh
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -f .venv/bin/activate ]; then
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
set -euo pipefail # not before: scripts of modules and of conda do not bear it
export RANKS_PER_NODE PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
exec python -m job.scaling run "$@"
