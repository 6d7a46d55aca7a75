# JUWELS Booster, JSC: settings for slurm/site.sh. Not tested there. Lines name the pages that were read.
# Use: export SITE=juwels-booster; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# A100, 4 GPUs per node, partition booster:
# https://github.com/Hi-PACE/hipace/blob/36420ba1233b6fee32b32fb2748cfa40b6ed77ae/docs/source/building/platforms/booster_jsc.rst
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# Same page.
export SBATCH_PARTITION=${SBATCH_PARTITION:-booster}
# The nodes have ParaStation's psid with psslurm in place of slurmd, so srun starts the ranks:
# https://apps.fz-juelich.de/jsc/hps/juwels/batchsystem.html
LAUNCHER=${LAUNCHER:-srun}
# psid's plug-in of srun for PMIx: https://github.com/ParaStation/psmgmt, plugins/pspmix/slurm. That JUWELS has it is
# not confirmed: check with your centre
SRUN_MPI=${SRUN_MPI:-pspmix}
