"""The CPU cores that this rank really has, and how it shares them between training and reading.

In: the affinity mask, the control group's limits, what Slurm and MPI put into the environment. Out: numbers of cores.
"""

import dataclasses
import os

# More readers than this never helped: at 3,000 images/s each they feed several GPUs, and each costs 60 MB.
_MOST_WORKERS = 32

# Where a launcher says how many ranks are on this node, and which of them this is.
_LOCAL_SIZES = ("HOROVOD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
_LOCAL_RANKS = ("HOROVOD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")


@dataclasses.dataclass(frozen=True)
class Cores:
    """`count`: cores this rank may keep busy. `mask`: their numbers where they are its own, else empty."""

    count: int
    mask: tuple[int, ...]


def cores_given() -> Cores:
    """The cores of this rank: its affinity mask, Slurm's --cpus-per-task and the control group's quota allow it these.

    Where ranks of one node share a mask (horovodrun binds nothing), it is divided among them.
    """
    affinity = sorted(os.sched_getaffinity(0))
    local_size, local_rank = _number(_LOCAL_SIZES) or 1, _number(_LOCAL_RANKS)
    node = _number(("SLURM_CPUS_ON_NODE",)) or os.cpu_count() or len(affinity)
    mask = affinity
    if local_size > 1 and len(affinity) * local_size > node:  # shared
        each = len(affinity) // local_size
        mask = affinity[local_rank * each : (local_rank + 1) * each] if local_rank is not None else []
        count = max(1, each)
    else:
        count = len(affinity)
    quota = cgroup_quota()
    if quota is not None:
        # The quota is of the control group, and so of all ranks of the node that share it.
        allowed = max(1, int(quota) // local_size)
        if allowed < count:
            count, mask = allowed, []
    per_task = _number(("SLURM_CPUS_PER_TASK",))
    if per_task and per_task < count:
        count, mask = per_task, []
    return Cores(count, tuple(mask) if len(mask) == count else ())


def default_workers() -> int:
    """Reader processes of a rank: a core each, but for one that the training thread has; at least one."""
    return max(1, min(cores_given().count - 1, _MOST_WORKERS))


def worker_cores(workers: int) -> tuple[int, ...]:
    """Cores on which the readers should run, so that the training thread has one without them; empty: anywhere.

    Only where the rank has cores of its own for all of them: otherwise pinning takes more than it gives.
    """
    mask = cores_given().mask
    return mask[1:] if workers and len(mask) > max(workers, 2) else ()


def _number(names: tuple[str, ...]) -> int | None:
    """The first of these environment variables that holds a number (Slurm writes `4(x2)` for two nodes of 4)."""
    for name in names:
        digits = os.environ.get(name, "").partition("(")[0]
        if digits.isdigit():
            return int(digits)
    return None


def cgroup_quota(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """CPU quota in cores, the smallest along this process's control groups, version 2 or 1; None: no limit."""
    try:
        with open(proc) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return None
    quotas = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            base = root
        elif "cpu" in controllers.split(","):
            base = os.path.join(root, "cpu")
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            quotas.append(_quota(os.path.join(base, *parts[:depth])))
    return min((quota for quota in quotas if quota), default=None)


def _quota(folder: str) -> float | None:
    try:
        if os.path.exists(os.path.join(folder, "cpu.max")):
            quota, period = _words(folder, "cpu.max")
        else:
            quota, period = *_words(folder, "cpu.cfs_quota_us"), *_words(folder, "cpu.cfs_period_us")
        return int(quota) / int(period) if quota.isdigit() else None  # "max" or -1: none
    except (OSError, ValueError):
        return None


def _words(folder: str, name: str) -> list[str]:
    with open(os.path.join(folder, name)) as file:
        return file.read().split()
