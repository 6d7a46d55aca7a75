# Perlmutter (GPU nodes), NERSC: settings for slurm/site.sh. Not tested there. Lines name their public sources.
# Use: export SITE=perlmutter; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 and one EPYC of 64 cores per node: https://docs.nersc.gov/systems/perlmutter/architecture/
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# The kind of node is a constraint, the queue a QOS (the default is "debug"): https://docs.nersc.gov/jobs/policy/
export SBATCH_CONSTRAINT=${SBATCH_CONSTRAINT:-gpu} SBATCH_QOS=${SBATCH_QOS:-regular}
# srun starts the ranks of Cray MPICH; there is no mpirun: https://docs.nersc.gov/jobs/
LAUNCHER=${LAUNCHER:-srun}
# The PMI of HPE Cray MPI in Slurm: https://slurm.schedmd.com/mpi_guide.html
SRUN_MPI=${SRUN_MPI:-cray_shasta}
# No local disks. $PSCRATCH is all flash, so leave STAGE=1 out: https://docs.nersc.gov/filesystems/perlmutter-scratch/
SCRATCH=${SCRATCH:-${PSCRATCH:-/tmp}}
