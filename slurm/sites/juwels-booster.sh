# JUWELS Booster, JSC: settings for slurm/site.sh. Not tested there. Lines name their public sources.
# Use: export SITE=juwels-booster; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 and 2 x 24 cores per node: https://apps.fz-juelich.de/jsc/hps/juwels/configuration.html
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# Partitions booster and develbooster: https://apps.fz-juelich.de/jsc/hps/juwels/batchsystem.html
export SBATCH_PARTITION=${SBATCH_PARTITION:-booster}
# Slurm's daemon on the nodes is ParaStation's psid (psslurm), so ranks are started by srun, with its plug-in for PMIx:
# https://apps.fz-juelich.de/jsc/hps/juwels/batchsystem.html, https://github.com/ParaStation/psmgmt
LAUNCHER=${LAUNCHER:-srun}
SRUN_MPI=${SRUN_MPI:-pspmix}
