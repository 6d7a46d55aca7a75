#!/bin/bash
# Train on a Slurm cluster to the end, through time limits, preemption and lost nodes:
#     cd REPOSITORY; sbatch --nodes=4 --gpus-per-node=4 slurm/train.sh --recipe paper --data /data/imagenet --out runs/paper
# Options after the script's name go to job.train; options before it go to sbatch and win over the lines below. What
# differs between clusters is in slurm/site.sh. STAGE=1 sbatch ... copies the shards to the nodes' own disks first.
# In an array job, %a in the options is the task's number: sbatch --array=0-4 slurm/train.sh --seed %a ...
#SBATCH --job-name=train
#SBATCH --nodes=1
##SBATCH --gpus-per-node=4      # one rank each (take one # away to use such a line)
##SBATCH --cpus-per-gpu=8       # for the processes that read and decode images
##SBATCH --time=24:00:00        # of one part: the job requeues itself until training is done
#SBATCH --signal=B:USR1@120     # seconds before the time limit at which the ranks are asked for a checkpoint
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=train-%j.out
# MAX_REQUEUES=0 sbatch ...: never requeue (default: 100 times); chain parts with sbatch --dependency=singleton instead

set -o pipefail
# Slurm runs a copy of this script; it knows where the original lies.
command=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1)
repository=${command%/slurm/train.sh*}
if [ ! -f "$repository/slurm/lib/launch.sh" ]; then
    echo "error: this is a job script; submit it where it lies: sbatch REPOSITORY/slurm/train.sh" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$repository/slurm/lib/launch.sh"

# A run directory that stays the same over requeues; the user's own --out comes later and wins.
task=${SLURM_ARRAY_TASK_ID:-}
options=(--out "runs/${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${task:+-$task}" --resume auto "$@")
[ -z "$task" ] || options=("${options[@]//%a/$task}")

# SIGUSR1 (time limit, preemption): the ranks finish their step, write a checkpoint and exit 75; the job goes on later.
# SIGTERM (scancel): the same, and the job ends there.
stop=
trap 'on_signal USR1' USR1
trap 'on_signal TERM' TERM

find_launcher mpirun srun horovodrun
code=0
[ "${STAGE:-}" != 1 ] || stage_data
if [ "$stop" ]; then
    code=75
elif [ "$code" = 0 ]; then
    attend "${launch[@]}" "${PYTHON[@]}" -m job.train "${options[@]}"
fi
trap '' USR1 TERM

# mpirun ends with 0 when it loses a node: only the run itself knows whether it is done.
[ "$code" != 0 ] || grep -qs '"status": "done"' "$(option out)/summary.json" || code=1
# Done, or an error that another attempt would meet as well?
again=
case $code in
    0 | 2) ;;
    75) again="stopped" ;; # with a checkpoint, or before the first step
    *)
        [ "$stop" = USR1 ] && again="stopped with exit code $code" || again=$(lost_nodes)
        # A rank that hung on a node that answers: the run has noted it.
        if tail -n 1 "$(option out)/metrics.jsonl" 2>/dev/null | grep -q '"event": "hang"'; then again=${again:-a rank hung}; fi
        ;;
esac
[ "$stop" = TERM ] && ! preempted && again=
[ -z "$again" ] || requeue_job "$again"
exit "$code"
