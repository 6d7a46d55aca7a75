# Jean Zay (V100; A100 below), IDRIS: settings for slurm/site.sh. Not tested there. Lines name the pages that were read.
# Use: export SITE=jean-zay; source slurm/site.sh; sbatch --account=... slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# gpu_p13 is the default: 4 V100 per node: http://www.idris.fr/en/docs/jean-zay/slurm/slurm_partitions_gpu
export SBATCH_GPUS_PER_NODE=${SBATCH_GPUS_PER_NODE:-4}
# A100, 8 per node: SBATCH_CONSTRAINT=a100 SBATCH_GPUS_PER_NODE=8:
# https://huggingface.co/datasets/PleIAs/Post-OCR-Correction/blob/main/irene_7.07.25/run.slurm
# Time limit on V100: 10 minutes unless it is given, at most 100 hours (first page above).
# 20 hours fit the QOS qos_gpu-t3: https://pypi.org/project/jz-hydra-submitit-launcher/0.1.1/
export SBATCH_TIMELIMIT=${SBATCH_TIMELIMIT:-20:00:00}
# No hyperthreads, and srun starts the ranks: https://github.com/CIA-Oceanix/4dvarnet-core/blob/main/main.slurm
export SBATCH_HINT=${SBATCH_HINT:-nomultithread}
# Same page.
LAUNCHER=${LAUNCHER:-srun}
# V100 have no bf16 tensor cores: the plain kernels train there (job/fast/README.md).
# $JOBSCRATCH is as $SCRATCH, which all users share, so not a disk of the node: leave STAGE=1 out.
# http://www.idris.fr/en/docs/jean-zay/environnement/espaces-disques
SCRATCH=${SCRATCH:-${JOBSCRATCH:-/tmp}}
