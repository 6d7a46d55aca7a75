"""How a rank shares its CPU cores (shards.machine.cores) between training and reading."""

from shards.machine.cores import cores_given

# More readers than this never helped: at 3,000 images/s each they feed several GPUs, and each costs 60 MB.
_MOST_WORKERS = 32


def default_workers() -> int:
    """Reader processes of a rank: one per core, keeping one core for the training thread; at least one."""
    return max(1, min(cores_given().count - 1, _MOST_WORKERS))


def worker_cores(workers: int) -> tuple[int, ...]:
    """Cores on which the readers should run, so that the training thread has one for itself; empty: anywhere.

    Only where the rank has a core of its own for each of them: otherwise pinning costs more than it gains.
    """
    mask = cores_given().mask
    return mask[1:] if workers and len(mask) > max(workers, 2) else ()
