#!/bin/bash
# Pack a data set into shards on all cores of the allocation:
#     cd REPOSITORY; sbatch --nodes=2 --ntasks-per-node=32 slurm/pack.sh SOURCE DEST [options of shards.pack]
# Options before the script's name go to sbatch and override the lines below. Settings of the cluster are in slurm/site.sh.
# After an interruption run the same command again: complete shards are kept.
#SBATCH --job-name=pack
#SBATCH --nodes=1
##SBATCH --ntasks-per-node=32   # processes per node, one per core (remove one # to use this line)
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=pack-%j.out

set -o pipefail
# Slurm runs a copy of this script. scontrol shows where the original is.
command=$(scontrol show job "${SLURM_JOB_ID:-none}" 2>/dev/null | sed -n 's/^ *Command=//p' | head -n 1)
repository=${command%/slurm/pack.sh*}
if [ ! -f "$repository/slurm/lib/launch.sh" ]; then
    echo "error: this is a job script; submit it where it lies: sbatch REPOSITORY/slurm/pack.sh" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR source=lib/launch.sh
source "$repository/slurm/lib/launch.sh"

per_node=${tasks:-$node_cpus} # ranks per node: as many as tasks or cores, whatever the number of GPUs
count_ranks
[ "$LAUNCHER" != horovodrun ] || LAUNCHER= # packing needs MPI, which horovodrun --gloo does not use
find_launcher mpirun srun
"${launch[@]}" "${PYTHON[@]}" -m shards.pack "$@"
code=$?
[ "$code" != 75 ] || requeue_job "stopped"
exit "$code"
