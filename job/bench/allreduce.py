"""Latency and bus bandwidth of Horovod's allreduce by message size: the subject `allreduce` of job.bench.

In: two or more ranks under horovodrun. Out: seconds and bus bandwidth from 1 KiB to 256 MiB. Bus bandwidth is
2 (n - 1) / n times the bytes over the time: what each link of a ring carries (NVIDIA, nccl-tests, PERFORMANCE.md).
"""

import argparse
import statistics
import sys
import time
from typing import Any

import horovod.torch as hvd
import torch

from job.ranks import agree
from shards.errors import InputError
from shards.machine.facts import cpu_and_cores, versions
from shards.machine.progress import Line

_SECONDS = 1.0  # for each size
_LEAST, _MOST = 5, 1000  # repetitions


def measure(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Measure on all ranks; rank 0 returns the fields of the JSON object.

    Raises:
        InputError: only one rank, or a size below 1 MiB.
    """
    if hvd.size() < 2:
        raise InputError("an allreduce needs ranks: horovodrun -np 2 python -m job.bench allreduce")
    if arguments.largest < 1:
        raise InputError(f"--largest is {arguments.largest}; it must be 1 or more")
    device = agree.agree(vars(arguments)).device
    sizes = [1024 * 4**power for power in range(20) if 1024 * 4**power <= arguments.largest * 2**20]
    rows, line = [], Line(sys.stderr)
    for number, size in enumerate(sizes, 1):
        if hvd.rank() == 0:
            line.show(f"allreduce of {size_text(size)}, size {number} of {len(sizes)}")
        rows.append(measure_size(size, device))
    line.clear()
    if hvd.rank():
        return None
    return {
        "subject": "allreduce",
        "ranks": hvd.size(),
        "bus_bandwidth": rows,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_and_cores(),
        "versions": versions(),
    }


def measure_size(size: int, device: torch.device, group: hvd.ProcessSet | None = None) -> dict[str, Any]:
    """Median seconds and bus bandwidth (byte/s) of an allreduce of `size` bytes.

    All ranks of `group` call it together; None: all ranks.
    """
    values = torch.ones(size // 4, device=device)
    ranks = list(range(hvd.size())) if group is None else group.ranks
    of_group = {} if group is None else {"process_set": group}

    def once() -> float:
        began = time.perf_counter()
        hvd.allreduce_(values, op=hvd.Average, name=f"bench_{size}", **of_group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    for _ in range(2):  # the first allocate buffers and fill Horovod's response cache
        once()
    # All ranks make the same number of repetitions: that of the first rank.
    count = max(_LEAST, min(_MOST, int(_SECONDS / once())))
    count = hvd.broadcast_object(count, name=f"count_{size}", **(of_group and of_group | {"root_rank": ranks[0]}))
    seconds = statistics.median(once() for _ in range(count))
    bandwidth = 2 * (len(ranks) - 1) / len(ranks) * size / seconds
    return {"bytes": size, "seconds": seconds, "bus_bandwidth": bandwidth, "repetitions": count}


def size_text(size: int) -> str:
    """16 KiB, 4 MiB."""
    return f"{size // 2**10} KiB" if size < 2**20 else f"{size // 2**20} MiB"


def text(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [f"{result['ranks']} ranks, {result['device']}", f"{'size':>10}  {'time':>12}  {'bus bandwidth':>14}"]
    for row in result["bus_bandwidth"]:
        lines.append(
            f"{size_text(row['bytes']):>10}  {row['seconds'] * 1e3:>9.3f} ms  {row['bus_bandwidth'] / 1e9:>9.3f} GB/s"
        )
    return "\n".join(lines)
