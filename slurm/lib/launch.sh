# Functions of the job scripts. A cluster's settings are in site.sh, which this file reads; nothing here needs editing.
# In: the variable `repository`, and the variables that Slurm sets. Out: find_launcher sets the array `launch`, the command
# that starts the ranks. The functions at the end also use `options`, the options of job.train.
# shellcheck shell=bash disable=SC2154

say() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID:-}: $*"; }
fail() {
    echo "error: $*" >&2
    exit 2
}

# Scripts of modules and of conda use unset variables, and bash before 4.4 treats an empty array as unset.
set +u
# shellcheck source-path=SCRIPTDIR/.. source=site.sh
source "$repository/slurm/site.sh" || exit 2
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# shellcheck source-path=SCRIPTDIR/.. source=activate.sh
source "$repository/slurm/activate.sh"
case $LAUNCHER in
    "" | mpirun | srun | horovodrun) ;;
    *) fail "LAUNCHER=$LAUNCHER is not one of mpirun, srun, horovodrun; correct slurm/site.sh, or leave it empty" ;;
esac

# Name of this job for scontrol. In a job array the number alone can mean all tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Pass the environment on to the ranks, also after sbatch --export=NONE.
export SLURM_EXPORT_ENV=ALL
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}

# Tasks per node, if the user asked for tasks. Slurm writes 4(x2) for four on each of two nodes, and 5,3 if they differ.
# shellcheck disable=SC2153
tasks=${SLURM_NTASKS_PER_NODE%%(*}
if [ -z "$tasks" ] && [ "${SLURM_NTASKS:-}" ] && [ -z "$RANKS_PER_NODE" ]; then
    tasks=${SLURM_TASKS_PER_NODE%%(*}
    [[ $SLURM_TASKS_PER_NODE != *,* ]] ||
        fail "Slurm placed $SLURM_NTASKS tasks as $SLURM_TASKS_PER_NODE on $SLURM_JOB_NODELIST, and each node must have as many; use sbatch --nodes=$nodes --ntasks-per-node=N"
fi
# Ranks per node: RANKS_PER_NODE, else the tasks asked for, else one per GPU, else one.
per_node=${RANKS_PER_NODE:-${tasks:-$((gpus > 1 ? gpus : 1))}}
[[ $per_node =~ ^[1-9][0-9]*$ ]] || fail "RANKS_PER_NODE=$per_node is not a number above 0; correct slurm/site.sh, or leave it empty"
all_gpus=${SLURM_GPUS##*:} # of --gpus=N
if ((gpus && ${all_gpus:-gpus * nodes} != gpus * nodes)); then
    fail "Slurm placed $all_gpus GPUs on $nodes nodes, $gpus of them on $SLURMD_NODENAME, and each node must have as many; use sbatch --nodes=$nodes --gpus-per-node=N"
fi
# Cores of the smallest node: 4 in "8(x2),4".
node_cpus=$(tr , '\n' <<<"${SLURM_JOB_CPUS_PER_NODE:-$SLURM_CPUS_ON_NODE}" | sort -n | head -n 1)
node_cpus=${node_cpus%%(*}
# Sets `ranks`, and `cpus` per rank, for $per_node ranks on each node.
count_ranks() {
    ranks=$((nodes * per_node))
    cpus=$((node_cpus / per_node))
    cpus=$((${SLURM_CPUS_PER_TASK:-cpus} < cpus ? SLURM_CPUS_PER_TASK : cpus))
    cpus=$((cpus > 0 ? cpus : 1))
}
count_ranks
# Limits per task or per GPU do not fit the ranks, and some versions of srun reject them beside --cpus-per-task. Without
# them, job steps and mpirun's daemons see all GPUs of the job on their node.
unset SLURM_CPUS_PER_GPU SLURM_NTASKS_PER_GPU SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK

if [ "$NETWORK_INTERFACE" ]; then
    for name in ${NETWORK_INTERFACE//,/ }; do
        grep -q "^ *${name%%:*}:" /proc/net/dev || fail "NETWORK_INTERFACE=$NETWORK_INTERFACE: no $name on $(hostname), which has$(sed -n 's/^ *\([^ :]*\):.*/ \1/p' /proc/net/dev | tr -d '\n') (python -m job.doctor, row \`network\`)"
    done
    export NCCL_SOCKET_IFNAME=$NETWORK_INTERFACE HOROVOD_GLOO_IFACE=$NETWORK_INTERFACE
    export OMPI_MCA_btl_tcp_if_include=$NETWORK_INTERFACE PRTE_MCA_prte_if_include=$NETWORK_INTERFACE
fi
# Let Open MPI (5, then 4) notice a node that has vanished after 20 seconds instead of 5 minutes.
export PRTE_MCA_oob_tcp_keepalive_time=5 PRTE_MCA_oob_tcp_keepalive_intvl=5 PRTE_MCA_oob_tcp_keepalive_probes=3
export OMPI_MCA_oob_tcp_keepalive_time=5 OMPI_MCA_oob_tcp_keepalive_intvl=5 OMPI_MCA_oob_tcp_keepalive_probes=3
# scancel sends SIGTERM to mpirun and its daemons too; they would kill the ranks before these have written a checkpoint.
# Block the signal for them, not for the ranks. Needs coreutils 8.31 or newer.
shield=()
if env --block-signal=TERM true 2>/dev/null; then
    shield=(env --block-signal=TERM)
    export PRTE_MCA_prte_launch_agent="env --block-signal=TERM,USR1 prted"
    export OMPI_MCA_orte_launch_agent="env --block-signal=TERM,USR1 orted"
fi

# set_launch LAUNCHER: sets `launch` to the command of one launcher.
set_launch() {
    case $1 in
        mpirun)
            # mpirun takes the number of slots from Slurm's tasks; make it the number of ranks.
            export SLURM_TASKS_PER_NODE="$per_node(x$nodes)"
            local program=mpirun version
            version=$(mpirun --version 2>/dev/null)
            if grep -qE 'Open ?(MPI|RTE)' <<<"$version"; then
                # Bind ranks to cores only if Slurm confines the job to its own cores. Otherwise two jobs on a node
                # could bind to the same ones.
                seen=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
                if [ "$seen" = "$SLURM_CPUS_ON_NODE" ] && ((cpus * per_node <= seen)); then
                    bind=(--use-hwthread-cpus --map-by "ppr:$per_node:node:PE=$cpus" --bind-to hwthread)
                else
                    bind=(--map-by "ppr:$per_node:node" --bind-to none)
                fi
            else
                bind=(-ppn "$per_node") # MPICH, Intel MPI
                # Intel's mpirun is a script around mpiexec.hydra that does not pass signals on.
                [[ $version != *Intel* ]] || program=mpiexec.hydra
            fi
            launch=("${shield[@]}" "$program" -np "$ranks" "${bind[@]}" "${MPIRUN_OPTIONS[@]}")
            ;;
        srun)
            # After a rank has failed, the others have 20 seconds to exit with their own exit codes.
            launch=(srun "--mpi=$SRUN_MPI" --kill-on-bad-exit=0 --wait=20 --nodes="$nodes" --ntasks="$ranks"
                --ntasks-per-node="$per_node" --cpus-per-task="$cpus" --cpu-bind=cores)
            ((node_cpus >= per_node)) || launch+=(--overcommit)
            ;;
        horovodrun)
            hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$per_node/" | paste -sd,)
            launch=("${shield[@]}" horovodrun --gloo -np "$ranks" -H "$hosts")
            # On one node horovodrun uses the loopback interface.
            if [ "$NETWORK_INTERFACE" ] && ((nodes > 1)); then launch+=(--network-interface "$NETWORK_INTERFACE"); fi
            ;;
    esac
}

# try_launcher LAUNCHER: fails, and prints why, unless it starts ranks that find each other.
try_launcher() {
    type "$1" >/dev/null 2>&1 || { echo "no such program; load its module in slurm/site.sh" && return 1; }
    set_launch "$1"
    local check='from mpi4py import MPI; import sys; n = MPI.COMM_WORLD.size
if n != int(sys.argv[1]): sys.exit(f"{sys.argv[1]} ranks were started, MPI sees {n}: launcher and MPI do not belong together")'
    if [ "$1" = horovodrun ]; then # over ssh, as training does, because login shells differ
        timeout 120 "${launch[@]}" "${PYTHON[@]}" -c pass 2>&1
    else
        timeout 120 "${launch[@]}" "${PYTHON[@]}" -c "$check" "$ranks" 2>&1
    fi
}

# find_launcher NAME...: sets `launch` for $LAUNCHER, or else for the first NAME that works. Ends the job if none does.
find_launcher() {
    local name why reasons=""
    for name in ${LAUNCHER:-"$@"}; do
        if why=$(try_launcher "$name"); then
            set_launch "$name"
            LAUNCHER=$name
            say "$ranks ranks on $nodes nodes by $name, $per_node per node, each with $cpus CPUs and $((gpus / per_node)) GPUs"
            ((node_cpus >= per_node)) || say "warning: $per_node ranks share $node_cpus CPUs; use --cpus-per-gpu or --cpus-per-task (python -m job.doctor, row \`cores\`)"
            ((gpus <= per_node)) || say "warning: a rank uses one GPU; for all $gpus of a node, set RANKS_PER_NODE=$gpus"
            return
        fi
        why=$(grep -vE '^[ -]*$' <<<"$why" | head -n 12)
        reasons+="$name: ${why:-no answer within its time}"$'\n'
    done
    printf '%s' "$reasons" >&2
    fail "no launcher works on $SLURM_JOB_NODELIST (reasons above); set LAUNCHER and SRUN_MPI in slurm/site.sh (python -m job.doctor, row \`mpirun\`)"
}

# ---- Used by train.sh only, except requeue_job.

# run_to_end COMMAND...: waits for a command even if signals arrive. Sets `code` to its exit code.
run_to_end() {
    "$@" &
    pid=$!
    kill_hanging_launcher "$pid" &
    local watcher=$!
    interrupted=1
    while [ "$interrupted" ]; do # `wait` also returns after a signal
        interrupted=
        wait "$pid"
        code=$?
    done
    pid=
    kill "$watcher" 2>/dev/null
    return "$code"
}

# mpirun and srun can wait forever for a lost node. Kill them 20 seconds after a rank has recorded that another one hangs.
kill_hanging_launcher() {
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

# on_signal NAME: records the signal in `stop`, and asks the ranks for a checkpoint.
on_signal() {
    interrupted=1
    [ "$stop" = TERM ] || stop=$1
    say "got SIG$1"
    if [ -z "${pid:-}" ]; then
        return
    elif [ "$LAUNCHER" = horovodrun ] && [ ! "${staging:-}" ]; then
        # horovodrun would exit at once. Signal its ranks on this node instead; they tell the others.
        grep -lsz "^SLURM_JOB_ID=$SLURM_JOB_ID\$" /proc/[0-9]*/environ | xargs -r grep -lsz '^HOROVOD_RANK=' |
            cut -d/ -f3 | xargs -r kill -USR1
    else
        kill -USR1 "$pid" 2>/dev/null # mpirun and srun forward it
    fi
}

# Prints the other nodes of the job that do not answer, with their ranks; nothing if all answer.
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

# Whether Slurm takes the nodes away for another job. It then sends SIGTERM as scancel does, but the job shall continue.
preempted() { scontrol show job "$job" | grep -q 'PreemptTime=[0-9]'; }

# STAGE=1: each node copies the shards of --data to its own disk. Sets `code`: 0 if training can start, which includes a
# disk that is too small for copies.
stage_data() {
    name_copies
    say "copying $data to $staged on $nodes nodes"
    staging=1
    run_to_end srun --mpi=none --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --kill-on-bad-exit=0 \
        "${PYTHON[@]}" "$repository/slurm/lib/stage.py" "$data" "$staged"
    staging=
    if [ "$code" = 0 ]; then
        say "copied"
        options+=(--data "$staged")
    elif [ "$code" = 3 ]; then
        say "warning: no copies, because a disk is too small; training reads $data itself"
        code=0
    fi
}

# Sets `data`, the folder of --data, and `staged`, the folder of its copies.
name_copies() {
    data=$(option data)
    [ -d "$data" ] || fail "STAGE=1: no folder --data $data"
    # Named after the whole path: data sets do not mix, and a requeued job finds its copies again.
    staged=$SCRATCH/shards-$(id -un)-$(realpath "$data" | sha256sum | cut -c1-12)
}

# option NAME: prints the value of an option of job.train, the last one if it was given twice.
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

# requeue_job WHY: lets Slurm start this job again, at most MAX_REQUEUES times.
requeue_job() {
    local limit=${MAX_REQUEUES:-100} # 0: never requeue
    if ((${SLURM_RESTART_COUNT:-0} >= limit)); then
        say "$1; not requeued, for MAX_REQUEUES=$limit"
        return
    fi
    say "$1; requeueing"
    scontrol requeue "$job" || say "Slurm does not requeue this job (sbatch --no-requeue, or JobRequeue=0 of the cluster);" \
        "submit the same command again, or chain jobs with sbatch --dependency=singleton"
}
