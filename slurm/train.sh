#!/bin/bash
# Train on a Slurm cluster until done, across time limits, preemption and lost nodes:
#     cd REPOSITORY; sbatch --nodes=4 --gpus-per-node=4 slurm/train.sh --recipe paper --data /data/imagenet --out runs/paper
# Options after the script's name go to job.train; options before it go to sbatch and override the lines below. Settings of
# the cluster are in slurm/site.sh. `STAGE=1 sbatch ...` first copies the shards to the nodes' own disks.
# In a job array, %a in the options is the number of the task: sbatch --array=0-4 slurm/train.sh --seed %a ...
#SBATCH --job-name=train
#SBATCH --nodes=1
##SBATCH --gpus-per-node=4      # one rank per GPU (remove one # to use this line)
##SBATCH --cpus-per-gpu=8       # for the processes that read and decode images
##SBATCH --time=24:00:00        # time limit of one part: the job requeues itself until training is done
#SBATCH --signal=B:USR1@120     # ask the ranks for a checkpoint this many seconds before the time limit
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train-%j.out
# `MAX_REQUEUES=0 sbatch ...` never requeues (default: 100 times); chain jobs with sbatch --dependency=singleton instead.

set -o pipefail
# Slurm runs a copy of this script. scontrol shows where the original is.
command=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1)
repository=${command%/slurm/train.sh*}
if [ ! -f "$repository/slurm/lib/launch.sh" ]; then
    echo "error: this is a job script; submit it where it lies: sbatch REPOSITORY/slurm/train.sh" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$repository/slurm/lib/launch.sh"

# A run directory that stays the same after a requeue. An --out of the user comes later and overrides it.
task=${SLURM_ARRAY_TASK_ID:-}
options=(--out "runs/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+-$task}" --resume auto "$@")
[ -z "$task" ] || options=("${options[@]//%a/$task}")

# SIGUSR1 (time limit, preemption): the ranks finish their step, write a checkpoint and exit with 75; the job is requeued.
# SIGTERM (scancel): the same without the requeue.
stop=
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

find_launcher mpirun srun horovodrun
code=0
[ "${STAGE:-}" != 1 ] || stage_data
if [ "$stop" ]; then
    code=75
elif [ "$code" = 0 ]; then
    run_to_end "${launch[@]}" "${PYTHON[@]}" -m job.train "${options[@]}"
fi
trap '' USR1 TERM

# mpirun exits with 0 when it loses a node, so look into the run directory for whether training is done.
[ "$code" != 0 ] || grep -qs '"status": "done"' "$(option out)/summary.json" || code=1
# The reason to requeue the job, if there is one.
again=
case $code in
    0 | 2) ;; # done, or an error that would occur again
    75) again="stopped" ;; # with a checkpoint, or before the first step
    *)
        [ "$stop" = USR1 ] && again="stopped with exit code $code" || again=$(lost_nodes)
        # A rank may hang on a node that answers; the run has recorded that.
        if tail -n 1 "$(option out)/metrics.jsonl" 2>/dev/null | grep -q '"event": "hang"'; then again=${again:-a rank hung}; fi
        ;;
esac
[ "$stop" = TERM ] && ! preempted && again=
[ -z "$again" ] || requeue_job "$again"
exit "$code"
