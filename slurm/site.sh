# All that differs between clusters: edit this file once. The job scripts of this folder read it on the compute node; read
# it in your shell too, before sbatch, for the lines that begin with SBATCH_ (cd REPOSITORY; source slurm/site.sh).
# A variable that is set already is kept: LAUNCHER=srun sbatch slurm/train.sh ...
# shellcheck shell=bash disable=SC2034

# Modules: compiler, MPI and, for GPUs, CUDA: those that slurm/install.sh was run with.
#module load gcc/12 openmpi/5 cuda/12
# The Python environment. Default: the one active at sbatch, else .venv of the repository, which install.sh makes.
#source ~/venvs/alexnet/bin/activate

# Which account pays, and which partition runs. On the command line: sbatch --account=... --partition=...
#export SBATCH_ACCOUNT=project123
#export SBATCH_PARTITION=gpu
# GPUs a node: what to ask for; each gets a rank, and its share of the cores. On the command line: sbatch --gpus-per-node=4
#export SBATCH_GPUS_PER_NODE=4

# Ranks a node. Default: --ntasks-per-node where it is given, else the GPUs of a node, else one.
RANKS_PER_NODE=${RANKS_PER_NODE:-}

# What starts the ranks: mpirun, srun or horovodrun (over ssh, Gloo instead of MPI). Empty: the first of them that works.
LAUNCHER=${LAUNCHER:-}
# The MPI plug-in of srun (srun --mpi=list names them): pmix, pmi2, cray_shasta, ...
SRUN_MPI=${SRUN_MPI:-pmix}
# More options for mpirun, for instance the transport: (--mca pml ucx)
MPIRUN_OPTIONS=()

# Network interface between the nodes (ip addr lists them): ib0, hsn0, eth0. Empty: the libraries choose; name one where
# they choose a wrong one and start-up hangs. horovodrun needs it.
NETWORK_INTERFACE=${NETWORK_INTERFACE:-}

# Folder on the node's own disk, for STAGE=1.
SCRATCH=${SCRATCH:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}

# The command in front of `-m job.train`; it may begin with a container.
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
# 2. Apptainer container with Horovod and its own MPI; Slurm's PMIx joins the ranks, so that no MPI outside is needed:
#      module load apptainer
#      PYTHON=(apptainer exec --nv --bind /scratch "$HOME/horovod.sif" python)
#      LAUNCHER=srun
#      SRUN_MPI=pmix
#
# 3. Cray (Slingshot, Cray MPICH, PMI; no mpirun):
#      module load PrgEnv-gnu cray-python craype-accel-nvidia80
#      source "$HOME/alexnet/bin/activate"
#      LAUNCHER=srun
#      SRUN_MPI=cray_shasta
#      NETWORK_INTERFACE=hsn0
