# Settings of your cluster: edit this file once. The job scripts of this folder read it on the compute node. sbatch itself
# reads the SBATCH_ variables, so source this file in your shell before sbatch too (cd REPOSITORY; source slurm/site.sh).
# A variable that is already set is kept: LAUNCHER=srun sbatch slurm/train.sh ...
# On a machine of slurm/sites (ls slurm/sites), `export SITE=perlmutter` before that sets most of it.
# shellcheck shell=bash disable=SC2034
if [ "${SITE:-}" ]; then
    _sites=$(dirname "${BASH_SOURCE[0]:-$0}")/sites
    if [[ $SITE == */* ]] || [ ! -f "$_sites/$SITE.sh" ]; then
        echo "error: SITE=$SITE is not one of$(cd "$_sites" && printf ' %s' *.sh | sed 's/\.sh//g')" >&2
        return 2
    fi
    # shellcheck disable=SC1090
    source "$_sites/$SITE.sh"
    unset _sites
fi

# Modules: the compiler, the MPI and, for GPUs, CUDA that were loaded when slurm/install.sh ran.
#module load gcc/12 openmpi/5 cuda/12
# The Python environment. Default: the one that is active at sbatch, else .venv of the repository, which install.sh makes.
#source ~/venvs/alexnet/bin/activate

# Account and partition. On the command line: sbatch --account=... --partition=...
#export SBATCH_ACCOUNT=project123
#export SBATCH_PARTITION=gpu
# GPUs per node to ask for. Each gets one rank and its share of the cores. On the command line: sbatch --gpus-per-node=4
#export SBATCH_GPUS_PER_NODE=4

# Ranks per node. Empty: --ntasks-per-node if it is given, else the number of GPUs per node, else one.
RANKS_PER_NODE=${RANKS_PER_NODE:-}

# What starts the ranks: mpirun, srun, or horovodrun (ssh, and Gloo instead of MPI). Empty: the first of them that works.
LAUNCHER=${LAUNCHER:-}
# MPI plug-in of srun: pmix, pmi2, cray_shasta, ... (srun --mpi=list prints those of your cluster).
SRUN_MPI=${SRUN_MPI:-pmix}
# More options for mpirun, for instance the transport: (--mca pml ucx)
MPIRUN_OPTIONS=()

# Network interface between the nodes: ib0, hsn0, eth0, ... (ip addr lists them). Empty: the libraries choose. Set it if
# they choose a wrong one, so that jobs hang at the start. horovodrun needs it on more than one node.
NETWORK_INTERFACE=${NETWORK_INTERFACE:-}

# Folder on the node's own disk, to which STAGE=1 copies the shards.
SCRATCH=${SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}

# The Python command that `-m job.train` is appended to; it may start a container.
PYTHON=(python)

# Three examples.
#
# 1. Modules and the cluster's own MPI:
#      module purge; module load gcc/12 openmpi/4.1 cuda/12
#      export SBATCH_ACCOUNT=project123 SBATCH_PARTITION=gpu SBATCH_GPUS_PER_NODE=4
#      LAUNCHER=mpirun
#      NETWORK_INTERFACE=ib0
#      SCRATCH=/local/$USER
#
# 2. Apptainer container with Horovod and its own MPI. Slurm's PMIx connects the ranks, so no MPI outside is needed:
#      module load apptainer
#      PYTHON=(apptainer exec --nv --bind /scratch "$HOME/horovod.sif" python)
#      LAUNCHER=srun
#      SRUN_MPI=pmix
#
# 3. Cray (Slingshot, Cray MPICH, PMI; no mpirun). Not tested:
#      module load PrgEnv-gnu cray-python craype-accel-nvidia80
#      source "$HOME/alexnet/bin/activate"
#      LAUNCHER=srun
#      SRUN_MPI=cray_shasta
#      NETWORK_INTERFACE=hsn0
