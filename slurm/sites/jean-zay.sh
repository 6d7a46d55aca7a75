# Jean Zay (V100; A100 and H100 below), IDRIS: settings for slurm/site.sh. Not tested there. Lines name their public sources.
# Use: export SITE=jean-zay; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# gpu_p13 is the default: 4 V100 per node: http://www.idris.fr/en/docs/jean-zay/slurm/slurm_partitions_gpu
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# A100, 8 per node: SBATCH_CONSTRAINT=a100 SBATCH_GPUS_PER_NODE=8 SBATCH_ACCOUNT=project@a100. H100, 4 per node:
# SBATCH_CONSTRAINT=h100 SBATCH_ACCOUNT=project@h100. http://www.idris.fr/en/docs/jean-zay/slurm/slurm_partitions_gpu
# The time limit is 10 minutes unless sbatch has --time, at most 100 hours for V100 (same page).
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-20:00:00}
# One rank per core, no hyperthreads: http://www.idris.fr/eng/jean-zay/gpu/jean-zay-gpu-exec_mpi_batch-eng.html
export SBATCH_HINT=${SBATCH_HINT:-nomultithread}
# srun starts the ranks of the Open MPI modules (same page).
LAUNCHER=${LAUNCHER:-srun}
# V100 have no bf16 tensor cores: the plain kernels train there (job/fast/README.md).
# Temporary folder of the job, on the file system that all nodes share: leave STAGE=1 out.
# http://www.idris.fr/eng/jean-zay/cpu/jean-zay-cpu-calculateurs-disques-eng.html
SCRATCH=${SCRATCH:-${JOBSCRATCH:-/tmp}}
