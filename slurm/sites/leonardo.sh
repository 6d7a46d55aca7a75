# Leonardo Booster, CINECA: settings for slurm/site.sh. Not tested there. Lines name their public sources.
# Use: export SITE=leonardo; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 (64 GB) and 32 cores per node: https://docs.hpc.cineca.it/hpc/leonardo.html
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# Partition boost_usr_prod, a day at most (boost_qos_dbg: half an hour): https://docs.hpc.cineca.it/hpc/leonardo.html
export SBATCH_PARTITION=${SBATCH_PARTITION:-boost_usr_prod} SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-24:00:00}
# Booster nodes have no local disk, $TMPDIR is in memory: leave STAGE=1 out: https://docs.hpc.cineca.it/hpc/leonardo.html
SCRATCH=${SCRATCH:-${TMPDIR:-/tmp}}
