"""The CPU cores that this process may use: for reading, packing, verifying, training.

In: the affinity mask, the limits of control groups, what Slurm and MPI put into the environment. Out: how many cores,
and which. The mask alone does not say: on a cluster that does not confine its tasks it has all cores of a node, most of
them used by others, and ranks that are not bound share one mask.
"""

import dataclasses
import os
from collections.abc import Iterator

# Variables in which a launcher says how many ranks are on this node, and which of them this is.
_LAUNCHERS = (
    ("HOROVOD_LOCAL_SIZE", "HOROVOD_LOCAL_RANK"),  # horovodrun over Gloo
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # Hydra: MPICH, Intel MPI
    ("MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),  # MVAPICH
)
# Slurm's steps from this number on were not started by srun: the batch script, the shell of salloc.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


@dataclasses.dataclass(frozen=True)
class Cores:
    """`count`: cores this process may use. `mask`: their numbers, if no other process shares them; else empty."""

    count: int
    mask: tuple[int, ...]


def cores_given(local_size: int = 0) -> Cores:
    """The cores that the affinity mask, Slurm and the quota of the control group allow this process.

    A rank gets its part of what the ranks of its node share. If Slurm counts cores and the mask has both hyperthreads
    of each, this counts as Slurm does.

    Args:
        local_size: ranks on this node, if known; 0: as the launcher's environment says.
    """
    affinity = sorted(os.sched_getaffinity(0))
    found, rank = _local_ranks()
    ranks = local_size or found or 1
    granted = _number("SLURM_CPUS_ON_NODE") or _of_node("SLURM_JOB_CPUS_PER_NODE")
    most = granted or _cpuset() or os.cpu_count() or len(affinity)  # cores of this node that the job may use
    count = min(len(affinity), max(1, most // ranks))
    mask: list[int] = []
    if count == len(affinity) <= most:  # bound, or alone
        mask = affinity
    elif len(affinity) == most and rank is not None:  # the job's, shared by its ranks
        mask = affinity[rank * count : (rank + 1) * count]
    limits = []
    quota = cgroup_quota()
    if quota is not None:  # shared by all ranks of the node
        limits.append(int(quota) // ranks)
    if local_size or found or not granted:  # a process that no launcher started may use all that the job has
        gpus = (_number("SLURM_GPUS_ON_NODE") or ranks) // ranks
        per_gpu = _number("SLURM_CPUS_PER_GPU")
        limits += [_number("SLURM_CPUS_PER_TASK"), per_gpu and per_gpu * max(1, gpus)]
    for limit in limits:
        if limit is not None and limit < count:
            count, mask = max(1, limit), []
    return Cores(count, tuple(mask) if len(mask) == count else ())


def local_ranks() -> int:
    """Number of ranks on this node, as the launcher says; 0 where it does not."""
    return _local_ranks()[0] or 0


def _local_ranks() -> tuple[int | None, int | None]:
    """Number of ranks on this node, and that of this process; None: no launcher has started it."""
    for size, rank in _LAUNCHERS:
        if _number(size):
            return _number(size), _number(rank)
    # Without srun the numbers of tasks are in the environment too, but they are those of the job.
    step = _number("SLURM_STEP_ID")
    if step is not None and step < _FIRST_SPECIAL_STEP:
        return _of_node("SLURM_STEP_TASKS_PER_NODE") or _of_node("SLURM_TASKS_PER_NODE"), _number("SLURM_LOCALID")
    return None, None


def _number(name: str) -> int | None:
    """An environment variable that holds a number."""
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else None


def _of_node(name: str) -> int | None:
    """This node's number in a list of Slurm: `4(x2),3` says 4 for the first two nodes and 3 for the third."""
    numbers: list[int] = []
    for part in os.environ.get(name, "").split(","):
        number, _, times = part.rstrip(")").partition("(x")
        if not (number.isdigit() and (times or "1").isdigit()):
            return None
        numbers += [int(number)] * int(times or 1)
    return numbers[min(_number("SLURM_NODEID") or 0, len(numbers) - 1)]


def cgroup_quota(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """CPU quota in cores: the smallest of this process's control groups (version 2 or 1); None: no limit."""
    return min((quota for folder in _groups("cpu", proc, root) if (quota := _quota(folder))), default=None)


def memory_limit(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int | None:
    """Bytes that this process's control groups allow, version 2 or 1: the smallest limit; None: no limit."""
    limits = []
    for folder in _groups("memory", proc, root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            try:
                (word,) = _words(folder, name)
            except (OSError, ValueError):
                continue
            if word.isdigit() and int(word) < 1 << 60:  # version 1 writes a number near 2^63 for none
                limits.append(int(word))
    return min(limits, default=None)


def _cpuset(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int | None:
    """Cores in the set of the innermost control group that has one, version 2 or 1; None: there is none."""
    for folder in _groups("cpuset", proc, root):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            try:
                bounds = [part.split("-") for part in _words(folder, name)[0].split(",")]
                return sum(int(part[-1]) - int(part[0]) + 1 for part in bounds)
            except (OSError, ValueError, IndexError):
                continue
    return None


def _groups(controller: str, proc: str, root: str) -> Iterator[str]:
    """Folders of the control groups that limit this process, from the innermost outwards."""
    try:
        with open(proc) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":  # version 2: one tree for all controllers
            base = root
        elif controller in controllers.split(","):
            base = os.path.join(root, controller)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield os.path.join(base, *parts[:depth])


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
