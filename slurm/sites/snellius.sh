# Snellius (A100; H100 below), SURF: settings for slurm/site.sh. Not tested there. Lines name their public sources.
# Use: export SITE=snellius; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# 4 A100 and 72 cores per node: https://servicedesk.surf.nl/wiki/spaces/WIKI/pages/30660209/Snellius+partitions
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# gpu_a100: at least a quarter of a node, 18 cores and a GPU (same page). H100, 64 cores: SBATCH_PARTITION=gpu_h100.
export SBATCH_PARTITION=${SBATCH_PARTITION:-gpu_a100}
# NCCL finds no other nodes unless it is told the interface; eno2np0 on the H100 nodes:
# https://servicedesk.surf.nl/wiki/display/WIKI/Snellius+known+issues, https://github.com/HPC-TUE/multi-gpu
case ${SLURM_JOB_PARTITION:-$SBATCH_PARTITION} in
    gpu_h100) NETWORK_INTERFACE=${NETWORK_INTERFACE:-eno2np0} ;;
    *) NETWORK_INTERFACE=${NETWORK_INTERFACE:-eno1np0} ;;
esac
