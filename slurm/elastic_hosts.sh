#!/bin/bash
# For elastic training, in an allocation that outlives a lost node (sbatch --no-kill):
#     horovodrun -np 4 --min-np 2 --host-discovery-script slurm/elastic_hosts.sh --network-interface eth0 python -m job.train ...
# Prints `host:slots` for every node of the job whose ssh answers now; Horovod asks again every second.
set -u
slots=${RANKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}
for host in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    # shellcheck disable=SC2016
    timeout 2 bash -c '</dev/tcp/"$1"/22' ssh "$host" 2>/dev/null && echo "$host:$slots" &
done
wait
