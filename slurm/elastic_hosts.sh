#!/bin/bash
# Host discovery for elastic training, in an allocation that survives a lost node (sbatch --no-kill):
#     horovodrun -np 4 --min-np 2 --host-discovery-script slurm/elastic_hosts.sh --network-interface eth0 \
#         --blacklist-cooldown-range 10 300 python -m job.train ...
# Prints `host:slots` for every node of the job whose ssh port answers; Horovod calls it every second. Slots per node:
# RANKS_PER_NODE, else the tasks or GPUs of a node. If GLOBAL_BATCH is set (to the --global-batch of the run), it prints
# the largest number of slots that divides it.
set -u
slots=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
# Ask Slurm for the nodes that the job still has: one that was removed may belong to another job by now.
nodes=$([ -z "${SLURM_JOB_ID:-}" ] || timeout 5 squeue --noheader --jobs="$SLURM_JOB_ID" --format=%N 2>/dev/null)
answering=$(
    for host in $(scontrol show hostnames "${nodes:-$SLURM_JOB_NODELIST}"); do
        # shellcheck disable=SC2016
        timeout 2 bash -c '</dev/tcp/"$1"/22' ssh "$host" 2>/dev/null && echo "$host" &
    done
    wait
)
answering=$(sort -V <<<"$answering") # sorted, so that the same hosts are left out each time
ranks=$(($(wc -w <<<"$answering") * slots))
while ((ranks > 1 && ${GLOBAL_BATCH:-0} % ranks)); do ranks=$((ranks - 1)); done
for host in $answering; do
    here=$((ranks < slots ? ranks : slots))
    ranks=$((ranks - here))
    ((here == 0)) || echo "$host:$here"
done
exit 0
