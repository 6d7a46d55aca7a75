# Snellius (A100; H100 below), SURF: settings for slurm/site.sh. Not tested there. Lines name the pages that were read.
# Use: export SITE=snellius; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 and 72 cores per node: https://servicedesk.surf.nl/wiki/spaces/WIKI/pages/30660209/Snellius+partitions
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# gpu_a100: at least a quarter of a node, 18 cores and a GPU (same page). H100, 64 cores: SBATCH_PARTITION=gpu_h100.
export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu_a100}
# Interface for NCCL in scripts that users wrote for both kinds of nodes, because of trouble with InfiniBand there:
# https://github.com/HPC-TUE/multi-gpu, a100.sh and example_lighting/h100.sh
case ${SLURM_JOB_PARTITION:-$SBATCH_PARTITION} in
    gpu_h100) NETWORK_INTERFACE=${NETWORK_INTERFACE:-eno2np0} ;;
    *) NETWORK_INTERFACE=${NETWORK_INTERFACE:-eno1np0} ;;
esac
