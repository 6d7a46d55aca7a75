#!/bin/bash
# For elastic training, in an allocation that outlives a lost node (sbatch --no-kill):
#     horovodrun -np 4 --min-np 2 --host-discovery-script slurm/elastic_hosts.sh --network-interface eth0 \
#         --blacklist-cooldown-range 10 300 python -m job.train ...
# Prints `host:slots` for every node of the job whose ssh answers now; Horovod asks again every second. With GLOBAL_BATCH
# (the --global-batch of the run) it prints no more slots than divide that number.
set -u
slots=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
# A node that Slurm has taken out of the job may be another's by now.
nodes=$([ -z "${SLURM_JOB_ID:-}" ] || timeout 5 squeue --noheader --jobs="$SLURM_JOB_ID" --format=%N 2>/dev/null)
answering=$(
    for host in $(scontrol show hostnames "${nodes:-$SLURM_JOB_NODELIST}"); do
        # shellcheck disable=SC2016
        timeout 2 bash -c '</dev/tcp/"$1"/22' ssh "$host" 2>/dev/null && echo "$host" &
    done
    wait
)
answering=$(sort -V <<<"$answering") # the same hosts whenever some are left out
ranks=$(($(wc -w <<<"$answering") * slots))
while ((ranks > 1 && ${GLOBAL_BATCH:-0} % ranks)); do ranks=$((ranks - 1)); done
for host in $answering; do
    here=$((ranks < slots ? ranks : slots))
    ranks=$((ranks - here))
    ((here == 0)) || echo "$host:$here"
done
exit 0
