# What the job scripts share. It reads site.sh, and find_launcher makes of the allocation the command that starts the ranks:
# the array `launch`. In: `repository`; the functions below the line also `options`. Nothing here needs editing.
# shellcheck shell=bash disable=SC2154

say() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID:-}: $*"; }
fail() {
    echo "error: $*" >&2
    exit 2
}

# Scripts of modules and of conda use variables that are not set; bash before 4.4 takes an empty array for one.
set +u
# shellcheck source-path=SCRIPTDIR source=site.sh
source "$repository/slurm/site.sh"
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# shellcheck source-path=SCRIPTDIR source=activate.sh
source "$repository/slurm/activate.sh"
case $LAUNCHER in
    "" | mpirun | srun | horovodrun) ;;
    *) fail "LAUNCHER=$LAUNCHER is not one of mpirun, srun, horovodrun; correct slurm/site.sh, or leave it empty" ;;
esac

# This job to scontrol. The number alone can mean all tasks of an array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# sbatch --export=NONE would reach the ranks too.
export SLURM_EXPORT_ENV=ALL
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}

# Tasks per node, where the user asked for any: Slurm writes 4(x2) for four on each of two nodes, 5,3 for uneven ones.
# shellcheck disable=SC2153
tasks=${SLURM_NTASKS_PER_NODE%%(*}
if [ -z "$tasks" ] && [ "${SLURM_NTASKS:-}" ] && [ -z "$RANKS_PER_NODE" ]; then
    tasks=${SLURM_TASKS_PER_NODE%%(*}
    [[ $SLURM_TASKS_PER_NODE != *,* ]] ||
        fail "Slurm placed $SLURM_NTASKS tasks as $SLURM_TASKS_PER_NODE on $SLURM_JOB_NODELIST, and each node must have as many; use sbatch --nodes=$nodes --ntasks-per-node=N"
fi
# Ranks per node: as asked for, else one per GPU, else one.
per_node=${RANKS_PER_NODE:-${tasks:-$((gpus > 1 ? gpus : 1))}}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE=$per_node is not a number above 0; correct slurm/site.sh, or leave it empty"
all_gpus=${SLURM_GPUS##*:} # of --gpus=N
if ((gpus && ${all_gpus:-gpus * nodes} != gpus * nodes)); then
    fail "Slurm placed $all_gpus GPUs on $nodes nodes, $gpus of them on $SLURMD_NODENAME, and each node must have as many; use sbatch --nodes=$nodes --gpus-per-node=N"
fi
# The smallest node counts, as in "8(x2),4".
node_cpus=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}" | sort -n | head -n 1)
node_cpus=${node_cpus%%(*}
share_node() { # ranks and cores, for $per_node ranks on each node
    ranks=$((nodes * per_node))
    cpus=$((node_cpus / per_node))
    cpus=$((${SLURM_CPUS_PER_TASK:-cpus} < cpus ? SLURM_CPUS_PER_TASK : cpus))
    cpus=$((cpus > 0 ? cpus : 1))
}
share_node
# What was asked for per task or GPU holds for ranks no more; some versions of srun refuse it beside --cpus-per-task. So
# steps, and mpirun's daemons, see all GPUs of the job on their node.
unset SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK

if [ "$NETWORK_INTERFACE" ]; then
    for name in ${NETWORK_INTERFACE//,/ }; do
        grep -q "^ *${name%%:*}:" /proc/net/dev || fail "NETWORK_INTERFACE=$NETWORK_INTERFACE: no $name on $(hostname), which has$(sed -n 's/^ *\([^ :]*\):.*/ \1/p' /proc/net/dev | tr -d '\n')"
    done
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE HOROVOD_GLOO_IFACE=$NETWORK_INTERFACE
    export OMPI_MCA_btl_tcp_if_include=$NETWORK_INTERFACE PRTE_MCA_prte_if_include=$NETWORK_INTERFACE
fi
# Open MPI notices a node that has vanished after 5 minutes; these make it 20 seconds. First 5, then 4.
export PRTE_MCA_oob_tcp_keepalive_time=5 PRTE_MCA_oob_tcp_keepalive_intvl=5 PRTE_MCA_oob_tcp_keepalive_probes=3
export OMPI_MCA_oob_tcp_keepalive_time=5 OMPI_MCA_oob_tcp_keepalive_intvl=5 OMPI_MCA_oob_tcp_keepalive_probes=3
# scancel sends SIGTERM to mpirun and its daemons too, and their end would be that of the ranks before these have
# written a checkpoint. They do not get it (the ranks do). coreutils 8.31 or newer.
shield=()
if env --block-signal=TERM true 2>/dev/null; then
    shield=(env --block-signal=TERM)
    export PRTE_MCA_prte_launch_agent="env --block-signal=TERM,USR1 prted"
    export OMPI_MCA_orte_launch_agent="env --block-signal=TERM,USR1 orted"
fi

# The command of one launcher, into `launch`.
use() {
    case $1 in
        mpirun)
            # Slots: ranks follow the GPUs, whatever the number of Slurm's tasks.
            export SLURM_TASKS_PER_NODE="$per_node(x$nodes)"
            local program=mpirun version
            version=$(mpirun --version 2>/dev/null)
            if grep -qE 'Open ?(MPI|RTE)' <<<"$version"; then
                # Cores bound apart, where the cores that we see are ours alone; else the ranks of two jobs could be
                # bound to the same ones.
                seen=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
                if [ "$seen" = "$SLURM_CPUS_ON_NODE" ] && ((cpus * per_node <= seen)); then
                    bind=(--use-hwthread-cpus --map-by "ppr:$per_node:node:PE=$cpus" --bind-to hwthread)
                else
                    bind=(--map-by "ppr:$per_node:node" --bind-to none)
                fi
            else
                bind=(-ppn "$per_node") # MPICH, Intel MPI
                # Intel's mpirun is a script around this one, and does not pass signals on.
                [[ $version != *Intel* ]] || program=mpiexec.hydra
            fi
            launch=("${shield[@]}" "$program" -np "$ranks" "${bind[@]}" "${MPIRUN_OPTIONS[@]}")
            ;;
        srun)
            # Ranks of a failed job have 20 seconds to end with their own exit codes.
            launch=(srun "--mpi=$SRUN_MPI" --kill-on-bad-exit=0 --wait=20 --nodes="$nodes" --ntasks="$ranks"
                --ntasks-per-node="$per_node" --cpus-per-task="$cpus" --cpu-bind=cores)
            ((node_cpus >= per_node)) || launch+=(--overcommit)
            ;;
        horovodrun)
            hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$per_node/" | paste -sd,)
            launch=("${shield[@]}" horovodrun --gloo -np "$ranks" -H "$hosts")
            # On one node it talks over loopback, whatever the interface to the others is.
            if [ "$NETWORK_INTERFACE" ] && ((nodes > 1)); then launch+=(--network-interface "$NETWORK_INTERFACE"); fi
            ;;
    esac
}

# Does it start ranks that find each other? Prints why not.
try() {
    type "$1" >/dev/null 2>&1 || { echo "no such program; load its module in slurm/site.sh" && return 1; }
    use "$1"
    local check='from mpi4py import MPI; import sys; n = MPI.COMM_WORLD.size
if n != int(sys.argv[1]): sys.exit(f"{sys.argv[1]} ranks were started, MPI sees {n}: launcher and MPI do not belong together")'
    if [ "$1" = horovodrun ]; then # as training does it: login shells differ
        timeout 120 "${launch[@]}" "${PYTHON[@]}" -c pass 2>&1
    else
        timeout 120 "${launch[@]}" "${PYTHON[@]}" -c "$check" "$ranks" 2>&1
    fi
}

# Take LAUNCHER, or the first of the launchers given that works; end the job where none does.
find_launcher() {
    local name why reasons=""
    for name in ${LAUNCHER:-"$@"}; do
        if why=$(try "$name"); then
            use "$name"
            LAUNCHER=$name
            say "$ranks ranks on $nodes nodes by $name, $per_node per node, each with $cpus CPUs and $((gpus / per_node)) GPUs"
            ((node_cpus >= per_node)) || say "warning: $per_node ranks share $node_cpus CPUs; use --cpus-per-gpu or --cpus-per-task"
            ((gpus <= per_node)) || say "warning: a rank uses one GPU; for all $gpus of a node, set RANKS_PER_NODE=$gpus"
            return
        fi
        why=$(grep -vE '^[ -]*$' <<<"$why" | head -n 12)
        reasons+="$name: ${why:-no answer within its time}"$'\n'
    done
    printf '%s' "$reasons" >&2
    fail "no launcher works on $SLURM_JOB_NODELIST (reasons above); set LAUNCHER and SRUN_MPI in slurm/site.sh"
}

# ---- For train.sh.

# Run a command to its end, which signals do not hasten; its exit code also in `code`.
attend() {
    "$@" &
    pid=$!
    end_a_hanging_launcher "$pid" &
    local watcher=$!
    interrupted=1
    while [ "$interrupted" ]; do # a signal ends `wait`, too
        interrupted=
        wait "$pid"
        code=$?
    done
    pid=
    kill "$watcher" 2>/dev/null
    return "$code"
}

# mpirun and srun can wait for a lost node for ever. Once a rank has noted that another hangs, they have 20 seconds left.
end_a_hanging_launcher() {
    trap - USR1 TERM
    local metrics before last
    metrics=$(option out)/metrics.jsonl
    before=$(tail -n 1 "$metrics" 2>/dev/null)
    while sleep 3; do
        last=$(tail -n 1 "$metrics" 2>/dev/null)
        if [ "$last" != "$before" ] && [[ $last == *'"event": "hang"'* ]]; then
            sleep 20
            kill -KILL "$1" 2>/dev/null
            return
        fi
    done
}

# Remember what was asked for, and ask the ranks for a checkpoint.
on_signal() {
    interrupted=1
    [ "$stop" = TERM ] || stop=$1
    say "got SIG$1"
    if [ -z "${pid:-}" ]; then
        return
    elif [ "$LAUNCHER" = horovodrun ] && [ ! "${staging:-}" ]; then
        # It would end at once. Its ranks on this node get the signal from here and tell the others.
        grep -lsz "^SLURM_JOB_ID=$SLURM_JOB_ID\$" /proc/[0-9]*/environ | xargs -r grep -lsz '^HOROVOD_RANK=' |
            cut -d/ -f3 | xargs -r kill -USR1
    else
        kill -USR1 "$pid" 2>/dev/null # mpirun and srun hand it on
    fi
}

# Names the other nodes of the job that do not answer, if any, and the ranks there.
lost_nodes() {
    local node lost first=0
    ((nodes > 1)) || return 0
    lost=$(
        for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
            [ "$node" = "$SLURMD_NODENAME" ] ||
                timeout -k 2 10 srun --overlap --mpi=none --nodes=1 --ntasks=1 --nodelist="$node" true >/dev/null 2>&1 ||
                echo "$node (rank $first$( ((per_node == 1)) || echo " to $((first + per_node - 1))"))" &
            first=$((first + per_node))
        done
        wait
    )
    [ -z "$lost" ] || echo "lost ${lost//$'\n'/, }"
}

# Does Slurm take the nodes away for another job? Then it has sent SIGTERM, but we are to come back.
preempted() { scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; }

# STAGE=1: each node copies the shards of --data to its own disk. `code` is 0 where training can begin: also without
# copies, when a disk has no room for them.
stage_data() {
    find_data
    say "copying $data to $staged on $nodes nodes"
    staging=1
    attend srun --mpi=none --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        "${PYTHON[@]}" "$repository/slurm/lib/stage.py" "$data" "$staged"
    staging=
    if [ "$code" = 0 ]; then
        say "copied"
        options+=(--data "$staged")
    elif [ "$code" = 3 ]; then
        say "warning: no copies, for a disk is too small; training reads $data itself"
        code=0
    fi
}

find_data() {
    data=$(option data)
    [ -d "$data" ] || fail "STAGE=1: no folder --data $data"
    # Named after the whole path, so that two data sets do not mix and a requeued job finds its copies.
    staged=$SCRATCH/shards-$(id -un)-$(realpath "$data" | sha256sum | cut -c1-12)
}

# The value of an option of job.train, the last one where it was given twice.
option() {
    local i value=
    for i in "${!options[@]}"; do
        case ${options[i]} in
            "--$1") value=${options[i + 1]:-} ;;
            "--$1="*) value=${options[i]#*=} ;;
        esac
    done
    printf '%s' "$value"
}

# requeue_job WHY: let Slurm start this job again, unless it has been started often enough.
requeue_job() {
    local limit=${MAX_REQUEUES:-100} # 0: never
    if ((${SLURM_RESTART_COUNT:-0} >= limit)); then
        say "$1; not requeued, for MAX_REQUEUES=$limit"
        return
    fi
    say "$1; requeueing"
    scontrol requeue "$job" || say "Slurm does not requeue this job (sbatch --no-requeue, or JobRequeue=0 of the cluster);" \
        "submit the same command again, or chain jobs with sbatch --dependency=singleton"
}
