# Leonardo Booster, CINECA: settings for slurm/site.sh. Not tested there. Lines name the pages that were read.
# Use: export SITE=leonardo; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 and 32 cores per node: https://docs.hpc.cineca.it/hpc/leonardo.html
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# Partition boost_usr_prod; for short tests also SBATCH_QOS=boost_qos_dbg:
# https://github.com/ENCCS/vasp-best-practices/blob/main/content/leonardo.md
export SBATCH_PARTITION=${SBATCH_PARTITION:-boost_usr_prod}
# Give sbatch --time. Before STAGE=1, check with your centre whether $TMPDIR is a disk or in memory.
