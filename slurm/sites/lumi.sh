# LUMI-C (CPU nodes), CSC: settings for slurm/site.sh. Not tested there. Lines name the pages that were read.
# Use: export SITE=lumi; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034
# LUMI-G does not work: its GPUs are AMD's, and slurm/install.sh builds Horovod for NVIDIA's or for CPUs.
# "Guide" is https://github.com/Lumi-supercomputer/lumi-userguide, of October 2024.

# 128 cores per node: guide, docs/hardware/lumic.md. 16 ranks are our choice.
RANKS_PER_NODE=${RANKS_PER_NODE:-16}
# "standard": whole nodes, for two days at most: guide, docs/runjobs/scheduled-jobs/partitions.md
export SBATCH_PARTITION=${SBATCH_PARTITION:-standard}
# srun in place of mpirun: guide, docs/runjobs/scheduled-jobs/lumic-job.md
LAUNCHER=${LAUNCHER:-srun}
# The PMI of Cray MPICH (srun --mpi=list shows what there is).
# not confirmed: check with your centre
SRUN_MPI=${SRUN_MPI:-cray_shasta}
# Nodes have no local storage, /tmp is in memory: leave STAGE=1 out.
# Guide, docs/hardware/lumic.md, docs/storage/index.md
SCRATCH=${SCRATCH:-/tmp}
