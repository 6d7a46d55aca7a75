"""What a launcher (horovodrun, mpirun, srun) tells its processes through the environment, before MPI is initialised."""

import os

from shards.errors import see

# Variables that hold the rank of a process, and its number on its node.
_LOCAL_RANK_VARIABLES = (
    "HOROVOD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PMI_LOCAL_RANK",
    "SLURM_LOCALID",
)
# Beginnings of the variables that make a process a rank.
_LAUNCHERS_OWN = ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "HYDI_", "MPI_", "MV2_", "SLURM_STEP")
_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def launched_rank() -> int:
    """Rank of this process as its launcher (horovodrun, mpirun, srun) numbered it; 0 without one."""
    for variable in _RANK_VARIABLES:
        value = os.environ.get(variable, "")
        if value.isdigit():
            return int(value)
    return 0


# Variables that hold the number of processes, that of the innermost launcher first, and the launcher's name.
_SIZE_VARIABLES = {
    "HOROVOD_SIZE": "horovodrun",
    "OMPI_COMM_WORLD_SIZE": "mpirun of Open MPI",
    "MV2_COMM_WORLD_SIZE": "the launcher of MVAPICH",
    "PMI_SIZE": "mpirun of MPICH or Intel MPI",
    "SLURM_STEP_NUM_TASKS": "srun",  # set in a step alone, not in a batch script or in salloc's shell
}


def launched_size() -> int:
    """Number of processes that the launcher has started; 1 without one."""
    return next((int(os.environ[name]) for name in _SIZE_VARIABLES if os.environ.get(name, "").isdigit()), 1)


def launched_local_rank() -> int:
    """Number of this process among those on its node; 0 where the launcher does not say."""
    variables = (os.environ.get(name, "") for name in _LOCAL_RANK_VARIABLES)
    return next((int(value) for value in variables if value.isdigit()), 0)


def job_key() -> str:
    """A name that all processes of a launch share, mostly its own; "job" where the launcher has none."""
    found = os.environ.get("PMIX_NAMESPACE", "")
    if address := os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR"):
        found = f"{address}-{os.environ.get('HOROVOD_GLOO_RENDEZVOUS_PORT', '')}"
    elif not found and "SLURM_JOB_ID" in os.environ:
        found = f"slurm-{os.environ['SLURM_JOB_ID']}-{os.environ.get('SLURM_STEP_ID', '')}"
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in found) or "job"


def alone() -> dict[str, str]:
    """The environment for a program that is to run as a single process, although this process is a rank."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS_OWN)}


def lone_process(size: int, library: str) -> str:
    """The message for a launcher that started several processes, each of which sees only itself; empty: all is well.

    Args:
        size: the number of processes that `library` (Horovod, mpi4py) sees.
    """
    set_here = {name: os.environ[name] for name in _SIZE_VARIABLES if os.environ.get(name, "").isdigit()}
    name, count = next(iter(set_here.items()), ("", "1"))
    if size > 1 or count == "1":
        return ""
    if name == "PMI_SIZE" and set_here.get("SLURM_STEP_NUM_TASKS") == count:  # srun --mpi=pmi2
        name = "SLURM_STEP_NUM_TASKS"
    launcher = _SIZE_VARIABLES[name]
    advice = (
        f"use the mpirun of the MPI that {library} was built with, or build it for this MPI: "
        "bash slurm/install.sh --rebuild"
    )
    if launcher == "srun":
        advice = (
            f"use srun --mpi=pmix (srun --mpi=list shows what this cluster has), or mpirun -np {count} in its place; "
            "for one process use srun -n 1"
        )
    return (
        f"{launcher} started {count} processes, and {library} sees one, so each would do all of the work; {advice} "
        f"{see('mpirun')}"
    )
