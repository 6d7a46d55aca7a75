"""An allreduce between all ranks: whether the sum is right, and how fast it is within a node and between nodes.

In: every rank runs it at the same time, in a child process with the launcher's variables, so that a crash or a hang of
MPI, NCCL or Horovod ends the child alone. Out: one JSON object per rank.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from shards import ROOT
from shards.machine.launcher import lone_process

SECONDS = 90.0
BYTES, GPU_BYTES = 16 << 20, 256 << 20  # one message; on GPUs Horovod's cycle would hide the speed of a smaller one
NO_ANSWER = "no answer"  # of a rank that waits for another
_children: list[subprocess.Popen] = []


def run_child(library: str, nodes: Sequence[Sequence[int]], hopeless: Callable[[], bool]) -> dict[str, Any]:
    """What this rank's child found, or {"error": why}.

    Args:
        library: horovod or mpi4py.
        nodes: the ranks of each node.
        hopeless: whether another rank has failed, so that this one waits in vain.
    """
    # A child that hangs is killed at the end only (`end_children`): mpirun takes that for a failed rank, and ends the
    # job before rank 0 has printed its table.
    command = [sys.executable, "-c", "from job.doctor.together import main; main()", library, json.dumps(nodes)]
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
    )
    _children.append(child)
    began, out, err = time.monotonic(), None, ""
    while out is None:
        try:
            out, err = child.communicate(timeout=0.5)
        except subprocess.TimeoutExpired:
            if time.monotonic() - began > SECONDS:
                return {"error": f"no answer in {SECONDS:.0f} s"}
            if hopeless():
                return {"error": NO_ANSWER}
    for line in reversed(out.splitlines()):
        if line.startswith("{"):
            return json.loads(line)
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    ended = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
    return {"error": f"{ended}{': ' if lines else ''}{lines[-1][:300] if lines else ''}"}


def end_children() -> None:
    """End the children that hang."""
    for child in _children:
        child.kill()


def groups(nodes: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Ranks that measure together, besides all: those of each node, and the first of each node.

    Only groups of several ranks, and not of all. All ranks get the same groups in the same order.
    """
    size = sum(len(ranks) for ranks in nodes)
    found = {f"node {number}": list(ranks) for number, ranks in enumerate(nodes)}
    found["between"] = [ranks[0] for ranks in nodes]
    return {name: ranks for name, ranks in found.items() if 1 < len(ranks) < size}


def horovod(nodes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The sum, and bus bandwidths in byte/s: `all`, and of those of `groups` that this rank belongs to."""
    import horovod.torch as hvd
    import torch

    from job.bench.allreduce import measure_size
    from job.ranks.agree import assign_gpus, visible_gpus

    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"  # so that Horovod can say how many ranks it sees before them
    hvd.init()
    if problem := lone_process(hvd.size(), "Horovod"):
        return {"error": problem}
    sets = {name: hvd.add_process_set(ranks) for name, ranks in groups(nodes).items()}
    reports = hvd.allgather_object({"host": socket.gethostname(), "gpus": visible_gpus(False)}, name="doctor_gpus")
    index = assign_gpus(reports, "auto")[hvd.rank()]
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    if index is not None:
        torch.cuda.set_device(index)
    over = "NCCL" if index is not None and hvd.nccl_built() else "MPI" if hvd.mpi_enabled() else "Gloo"
    values = torch.full((1 << 20,), float(hvd.rank() + 1), device=device)
    total = hvd.allreduce(values, op=hvd.Sum, name="doctor_sum")
    expected = hvd.size() * (hvd.size() + 1) / 2
    size = BYTES if index is None else GPU_BYTES
    found: dict[str, Any] = {"over": over, "size": hvd.size(), "right": bool((total == expected).all().item())}
    found |= {"bytes": size, "all": measure_size(size, device)["bus_bandwidth"]}
    for name, group in sets.items():
        if hvd.rank() in group.ranks:
            found[name] = measure_size(size, device, group)["bus_bandwidth"]
        hvd.barrier()
    hvd.shutdown()
    return found


def mpi4py(nodes: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The same by mpi4py alone, where Horovod does not work."""
    import numpy as np
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if problem := lone_process(world.size, "mpi4py"):
        return {"error": problem}
    values, total = np.full(BYTES // 4, world.rank + 1, np.float32), np.empty(BYTES // 4, np.float32)

    def rate(communicator: Any) -> float:
        seconds = []
        for _ in range(6):
            communicator.Barrier()
            began = time.perf_counter()
            communicator.Allreduce(values, total)
            seconds.append(time.perf_counter() - began)
        n = communicator.size
        return 2 * (n - 1) / n * BYTES / sorted(seconds)[len(seconds) // 2]

    found: dict[str, Any] = {"over": "MPI, by mpi4py", "size": world.size, "bytes": BYTES, "all": rate(world)}
    found["right"] = bool((total == world.size * (world.size + 1) / 2).all())
    for name, ranks in groups(nodes).items():
        part = world.Split(0 if world.rank in ranks else MPI.UNDEFINED, world.rank)
        if part != MPI.COMM_NULL:
            found[name] = rate(part)
        world.Barrier()
    return found


def main() -> None:
    """The child process."""
    measure = {"horovod": horovod, "mpi4py": mpi4py}[sys.argv[1]]
    try:
        found = measure(json.loads(sys.argv[2]))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    print(json.dumps(found), flush=True)
