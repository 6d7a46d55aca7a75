"""Peak memory of a rank: of its GPU, of its process, and of the reader processes that it started.

In: /proc, and torch's allocator. Out: bytes.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch


class Peak(NamedTuple):
    """Bytes. GPU: 0 without one. Memory that the readers share with the rank counts once, in the rank's own."""

    gpu_allocated: float
    gpu_reserved: float
    host: float
    readers: float


def host_peak() -> tuple[float, float]:
    """Largest resident memory so far of this process, and the sum of those of its children that still run."""
    readers = 0.0
    for child in psutil.Process().children(recursive=True):
        values = _status(child.pid)
        readers += max(0, values.get("VmHWM", 0) - values.get("RssShmem", 0))
    return _status(os.getpid()).get("VmHWM", 0), readers


def peak(device: torch.device, host: tuple[float, float]) -> Peak:
    """Of this rank; `host`: what `host_peak` returned while the readers still ran."""
    gpu = (0.0, 0.0)
    if device.type == "cuda":
        gpu = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return Peak(float(gpu[0]), float(gpu[1]), *host)


def largest(ranks: Sequence[Peak]) -> dict[str, int | None]:
    """Of the ranks, the largest value of each, for summary.json; None for the GPU where there is none."""
    peaks = {
        f"{name}_bytes": int(max(values)) for name, values in zip(Peak._fields, zip(*ranks, strict=True), strict=True)
    }
    return {name: value or None if name.startswith("gpu") else value for name, value in peaks.items()}


def _status(pid: int) -> dict[str, int]:
    """The sizes of /proc/PID/status in bytes; empty for a process that has ended."""
    values = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if value.endswith(" kB\n"):
                values[name] = int(value.split()[0]) * 1024
    return values
