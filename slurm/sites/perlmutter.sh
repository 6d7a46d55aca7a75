# Perlmutter (GPU nodes), NERSC: settings for slurm/site.sh. Not tested there. Lines name the pages that were read.
# Use: export SITE=perlmutter; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 and one EPYC 7763 per node: https://docs.nersc.gov/systems/perlmutter/architecture
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# The kind of node is a constraint: https://github.com/E3SM-Project/E3SM/issues/4834
# The queue is a QOS (the default is "debug"): https://docs.nersc.gov/jobs/policy/
export SBATCH_CONSTRAINT=${SBATCH_CONSTRAINT:-gpu} SBATCH_QOS=${SBATCH_QOS:-regular}
# srun starts parallel tasks: https://docs.nersc.gov/jobs/
LAUNCHER=${LAUNCHER:-srun}
# The PMI of Cray MPICH (srun --mpi=list shows what there is).
# not confirmed: check with your centre
SRUN_MPI=${SRUN_MPI:-cray_shasta}
# $PSCRATCH is all flash, on all compute nodes, so leave STAGE=1 out:
# https://docs.nersc.gov/filesystems/perlmutter-scratch/
SCRATCH=${SCRATCH:-${PSCRATCH:-/tmp}}
