# LUMI-C (CPU nodes), CSC: settings for slurm/site.sh. Not tested there. Lines name their public sources.
# Use: export SITE=lumi; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034
# LUMI-G does not work: its GPUs are AMD's, and slurm/install.sh builds Horovod for NVIDIA's or for CPUs.

# Whole nodes of 2 x 64 cores: https://docs.lumi-supercomputer.eu/hardware/lumic/
RANKS_PER_NODE=${RANKS_PER_NODE:-16}
# "standard": whole nodes, for two days at most: https://docs.lumi-supercomputer.eu/runjobs/scheduled-jobs/partitions/
export SBATCH_PARTITION=${SBATCH_PARTITION:-standard}
# srun starts the ranks: https://docs.lumi-supercomputer.eu/runjobs/scheduled-jobs/lumic-job/
LAUNCHER=${LAUNCHER:-srun}
# The PMI of HPE Cray MPI in Slurm: https://slurm.schedmd.com/mpi_guide.html
SRUN_MPI=${SRUN_MPI:-cray_shasta}
# Nodes have no local disks: leave STAGE=1 out. https://docs.lumi-supercomputer.eu/storage/
SCRATCH=${SCRATCH:-/tmp}
