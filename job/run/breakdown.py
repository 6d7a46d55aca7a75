"""The contents of timings.json, for scaling studies: where a step's time went on every rank, on which machine.

In: the step timers of all ranks at the end of a run. Out: a dictionary for JSON.
"""

import os
import socket
import subprocess
from typing import Any

import horovod.torch as hvd
import torch
from torch.utils.flop_counter import FlopCounterMode

from job.config import Config
from job.network.alexnet import build
from job.run.log import SECTIONS
from job.run.resume import versions
from job.run.timing import StepTimer
from shards import ROOT
from shards.format.split import Split
from shards.machine.facts import cpu_name, file_system, network_links

# Settings of the layers below that change the speed of an allreduce.
_TUNING = ("HOROVOD_", "NCCL_", "OMP_NUM_THREADS", "UCX_")
_NOT_TUNING = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL",
    "HOROVOD_CROSS",
    "HOROVOD_GLOO",
    "HOROVOD_HOSTNAME",
    "HOROVOD_TERMINAL",
    "NCCL_SOCKET_IFNAME",  # horovodrun sets it by the number of nodes
)


def breakdown(config: Config, split: Split, timer: StepTimer, warmup: int, device: torch.device) -> dict[str, Any]:
    """Contents of timings.json; called by all ranks together.

    `ranks` has mean, median and 95th percentile of each section, in seconds per step. `fastest` and `slowest` are the
    least and the largest time of a section among the ranks of a step, averaged over the steps. (The least time in the
    allreduce is that of the rank which came last and waited for nobody.)

    Args:
        warmup: first steps that do not count.
    """
    rows = torch.tensor(list(timer.rows), dtype=torch.float64).reshape(-1, len(SECTIONS))  # (steps, sections)
    rows = rows[warmup if len(rows) > warmup else 0 :]
    found: dict[str, Any] = {
        "steps": len(rows),
        "global_batch": config.global_batch,
        "epochs": config.epochs,
        "nsamples": split.nsamples,
        "parallel": config.parallel,
    }
    if len(rows):
        share = torch.tensor([0.5, 0.95], dtype=torch.float64)
        own = torch.cat([rows.mean(0, keepdim=True), torch.quantile(rows, share, dim=0)])  # (3, sections)
        ranks = hvd.allgather(own[None], name="profile_ranks").tolist()
        hosts = hvd.allgather_object(socket.gethostname(), name="profile_hosts")
        step = rows.sum(1, keepdim=True)  # (steps, 1)
        low = hvd.allreduce(rows, op=hvd.Min, name="profile_min").mean(0).tolist()
        high = hvd.allreduce(rows, op=hvd.Max, name="profile_max").mean(0).tolist()
        found |= {
            "step_seconds": {"mean": step.mean().item(), "std": step.std(correction=0).item()},
            "ranks": [
                {
                    "rank": rank,
                    "host": host,
                    **{k: _named(values) for k, values in zip(("mean", "median", "p95"), three, strict=True)},
                }
                for rank, (three, host) in enumerate(zip(ranks, hosts, strict=True))
            ],
            "fastest": _named(low),
            "slowest": _named(high),
        }
    found["gradients"] = gradients(config) if hvd.rank() == 0 else []
    found["environment"] = environment(config.data, device)
    return found


def gradients(config: Config) -> list[dict[str, Any]]:
    """The network's gradients in the order in which the backward pass computes them.

    Each has `name`, `shape`, `bytes` and `ready`: the share of the backward pass that is over when it is complete,
    estimated from the layers' multiplications (the first layer needs no gradient of its input).
    """
    with torch.device("meta"):
        model = build(config).eval()  # batch normalisation refuses to learn from a single image
        if config.freeze == "conv":
            model.freeze_features()
        image = torch.empty(1, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(image)
    layers = [(name, layer) for name, layer in model.named_children() if name.startswith("fc") or not model.frozen]
    work = {name: sum(counter.get_flop_counts().get(f"AlexNet.{name}", {}).values()) for name, _ in layers}
    work = {name: 2 * flops if name != layers[0][0] else flops for name, flops in work.items()}
    total, done, found = sum(work.values()), 0, []
    for name, layer in reversed(layers):
        done += work[name]
        for kind, parameter in layer.named_parameters():
            found.append(
                {
                    "name": f"{name}.{kind}",
                    "shape": list(parameter.shape),
                    "bytes": parameter.numel() * parameter.element_size(),
                    "ready": done / total,
                }
            )
    return found


def environment(data: str, device: torch.device) -> dict[str, Any]:
    """The environment of this rank: hardware, versions, settings of Horovod, file system of the data, commit."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "ranks_per_node": hvd.local_size(),
        "nodes": hvd.cross_size(),
        "network": network_links(),
        "horovod_over": _transport(device),
        "versions": {
            **versions(),
            "cuda": torch.version.cuda or "",
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else "",
        },
        "tuning": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(_TUNING) and not k.startswith(_NOT_TUNING)
        },
        "file_system": file_system(data),
        "commit": _commit(),
    }
    return found


def _transport(device: torch.device) -> str:
    """What Horovod's messages go through."""
    if device.type == "cuda" and hvd.nccl_built():
        return "NCCL"
    return "MPI" if hvd.mpi_enabled() else "Gloo"


def _named(values: list[float]) -> dict[str, float]:
    return {name: round(value, 9) for name, value in zip(SECTIONS, values, strict=True)}


def _commit() -> str:
    """Commit of this code, with a + where the work tree differs from it; "" outside a repository."""
    commands = (["git", "rev-parse", "--short=12", "HEAD"], ["git", "status", "--porcelain", "-uno", "--", "job"])
    try:
        commit, changed = (
            subprocess.run(c, cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout for c in commands
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return commit.strip() + "+" * bool(changed.strip())
