#!/bin/bash
# Entry of the container: any command of the project, in the environment that build.sh has made.
#     docker run --gpus all --ipc=host alexnet horovodrun -np 2 python -m job.train ...
#     srun --mpi=pmix apptainer run --nv alexnet.sif python -m job.train ...
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export VIRTUAL_ENV=$repository/.venv PATH=$repository/.venv/bin:$PATH
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
# Docker runs as root, which Open MPI refuses unless it is told twice.
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
[ $# -gt 0 ] || set -- python -m job.doctor
exec "$@"
