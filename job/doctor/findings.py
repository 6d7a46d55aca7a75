"""What a check finds, and the rows of the report that messages of other commands refer to."""

import dataclasses
import functools
import os

from shards import ROOT

# Rows of the report: name -> what it is about. Messages of the product end with "(python -m job.doctor, row `shm`)".
ROWS = {
    "python": "version of Python",
    "code": "version of this project's code",
    "torch": "torch, and whether it can be imported",
    "gpu": "GPUs that torch can use, and the driver",
    "nccl": "NCCL in torch and in Horovod",
    "gpu memory": "memory of the GPUs, and what others use of it",
    "clocks": "clocks of the GPUs, and whether they are throttled",
    "links": "NVLink and PCIe of the GPUs",
    "horovod": "Horovod: whether it fits this torch, what it was built with",
    "horovodrun": "Horovod's launcher",
    "mpirun": "the MPI launcher, and whether it belongs to Horovod's MPI",
    "mpi4py": "mpi4py, and whether it uses Horovod's MPI",
    "webdataset": "the library that writes shards",
    "tensorboard": "whether the command tensorboard starts",
    "decoder": "the decoder of JPEG files, and its speed",
    "cores": "cores that are given to this process",
    "threads": "OMP_NUM_THREADS",
    "memory": "memory limit, and what is available",
    "shm": "/dev/shm, through which MPI and NCCL connect the ranks of a node",
    "compiler": "C compiler and headers, for Triton's kernels",
    "caches": "folders for compiled code",
    "files": "open files allowed",
    "infiniband": "InfiniBand adapters, and memory that they may lock",
    "slurm": "Slurm, and the job that this runs in",
    "data": "the shards: file system, speed of reading",
    "nodes": "ranks and nodes that answered",
    "network": "network links, and whether nodes reach each other",
    "time": "difference between the nodes' clocks",
    "allreduce": "an allreduce between all ranks: right or not, and how fast",
    "limits": "images/s that each stage allows, and the bottleneck (with --recipe or --ranks)",
}

_INSTALL = os.path.join(ROOT, "slurm", "install.sh")
# `pip install .` copies job and shards only.
SETUP = "bash slurm/install.sh" if os.path.exists(_INSTALL) else "in a clone of the project: bash slurm/install.sh"
REBUILD = f"{SETUP} --rebuild"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A row of the report.

    Attributes:
        status: ok, slow (it works, slower than it could) or wrong (it does not work).
        name: one of ROWS.
        advice: what to do where something is slow or wrong.
        same: what should be the same on all nodes; "": nothing.
        value: a figure of which more is better, to compare nodes by; None: there is none.
    """

    status: str
    name: str
    text: str
    advice: str = ""
    same: str = ""
    value: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ROWS:
            raise ValueError(f"no row {self.name} in job.doctor.findings.ROWS")


ok = functools.partial(Finding, "ok")
slow = functools.partial(Finding, "slow")
wrong = functools.partial(Finding, "wrong")

STATUSES = ("ok", "slow", "wrong")


def worst(findings: list[Finding]) -> str:
    """The worst status."""
    return max((finding.status for finding in findings), key=STATUSES.index, default="ok")


def as_json(finding: Finding) -> dict:
    """Fields of a finding that --json prints."""
    return {key: value for key, value in dataclasses.asdict(finding).items() if value not in (None, "")} | {
        "advice": finding.advice
    }
