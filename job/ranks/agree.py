"""What the ranks of a job must have in common: compared in one exchange, before anything depends on it.

In: what each rank finds on its node: GPUs, what the fast kernels need, JPEG decoders, versions, settings, data. Out:
each rank's device, and the kernels of all. All ranks see the same reports, so they take the same decision. A difference
that training cannot have is one error, which names two ranks and what each of them has.
"""

import dataclasses
import logging
import os
import platform
import socket
from collections.abc import Callable, Iterable
from typing import Any

import horovod
import horovod.torch as hvd
import torch
from PIL import features

from job.fast import support as fast
from shards.errors import InputError, see
from shards.machine.cores import cores_given
from shards.machine.facts import code_version
from shards.read import fastjpeg, images

log = logging.getLogger(__name__)

# Settings that may differ between ranks: where a rank finds its files, and what only rank 0 uses.
LOCAL = frozenset(
    "data out recipe workers init resume profile model.classes run checkpoint checkpoint-keep track metrics.prices "
    "metrics.textfile json".split()
)

# Rows of job.doctor that compare the same things.
_ROWS = {"this project's code": "code", "Python": "python", "torch": "torch", "Horovod": "horovod"}

Report = dict[str, Any]  # as `_report` makes it. Plain types: another version of this code must be able to read it


@dataclasses.dataclass(frozen=True)
class Agreed:
    """`device` of this rank, `kernels` of all ranks ("fast" or "plain"), and what `open_data` found on this rank."""

    device: torch.device
    kernels: str
    found: Any


def agree(settings: dict[str, Any], open_data: Callable[[], tuple[Any, dict[str, str]]] = lambda: (None, {})) -> Agreed:
    """Compare this rank with all others, and choose its device. All ranks call it together, before any other message.

    Args:
        settings: by option name.
        open_data: opens the data on this rank. Returns it, and what must be the same on all ranks, name -> text.

    Raises:
        InputError: on all ranks alike: `open_data` failed on some rank, a rank has no GPU, or the ranks differ.
    """
    found, report = _report(settings, open_data)
    reports = hvd.allgather_object(report, name="agree")
    gpus = check(reports, settings.get("device", "auto"))
    kernels = choose_kernels(reports, gpus, settings)
    if hvd.rank() == 0:
        for warning in warnings(reports, gpus, settings):
            log.warning("%s", warning)
    index = gpus[hvd.rank()]
    if index is not None:
        torch.cuda.set_device(index)
        return Agreed(torch.device("cuda", index), kernels, found)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_given(hvd.local_size()).count)
    return Agreed(torch.device("cpu"), kernels, found)


def _report(settings: dict[str, Any], open_data: Callable) -> tuple[Any, Report]:
    found, facts, problem = None, {}, ""
    try:
        found, facts = open_data()
    except InputError as error:
        problem = str(error)
    return found, {
        "host": socket.gethostname(),
        "problem": problem,
        "same": {
            "this project's code": code_version(),
            "Python": ".".join(platform.python_version_tuple()[:2]),
            "torch": torch.__version__,
            "Horovod": horovod.__version__,
            **{f"--{name.replace('_', '-')}": value for name, value in settings.items() if name not in LOCAL},
            **facts,
        },
        "gpus": [] if settings.get("device") == "cpu" else visible_gpus(settings.get("kernels", "plain") != "plain"),
        "decoder": _decoders() if any(name.startswith("split") for name in facts) else "",
    }


def visible_gpus(fast_wanted: bool) -> list[dict[str, str]]:
    """The GPUs that this rank sees: a name that differs on all nodes, model, and why the fast kernels cannot run."""
    slices = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")  # slices of MIG may all have the UUID of their GPU
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        uuid = slices[index] if index < len(slices) and slices[index].startswith("MIG-") else str(properties.uuid)
        plain = fast.unsupported(torch.device("cuda", index)) if fast_wanted else ""
        found.append({"uuid": uuid, "name": properties.name, "plain": plain})
    return found


def _decoders() -> str:
    """The JPEG decoders of this process, in the order in which they are tried."""
    simplejpeg = f"simplejpeg {images.simplejpeg.__version__}" if images.simplejpeg else ""
    library = features.version("libjpeg_turbo")
    pillow = f"Pillow with {'libjpeg-turbo ' + library if library else 'a libjpeg that is not libjpeg-turbo'}"
    return ", ".join(filter(None, ("" if fastjpeg.missing() else "shards/read/jpeg.c", simplejpeg, pillow)))


# The functions below depend on the reports of all ranks only.


def check(reports: list[Report], wanted: str) -> list[int | None]:
    """Number of each rank's GPU, as that rank sees them; None for all: the CPU. Raises InputError if ranks differ."""
    if problem := _problem(reports):
        raise InputError(problem)
    if difference := _difference(reports):
        raise InputError(difference)
    return assign_gpus(reports, wanted)


def where(reports: list[Report], rank: int) -> str:
    """Name of a rank in messages."""
    return f"rank {rank} on {reports[rank]['host']}"


def _others(ranks: list[int]) -> str:
    """` (and N other ranks)` for all but the first of these."""
    count = len(ranks) - 1
    return f" (and {count} other rank{'s' * (count > 1)})" if count > 0 else ""


def _problem(reports: list[Report]) -> str:
    """Why data could not be opened, with the rank unless all ranks have the same problem; "": all could."""
    failed = [rank for rank, report in enumerate(reports) if report["problem"]]
    if not failed:
        return ""
    text = reports[failed[0]]["problem"]
    if all(report["problem"] == text for report in reports):
        return text
    return f"{where(reports, failed[0])}{_others(failed)}: {text}"


def _difference(reports: list[Report]) -> str:
    """The first thing that is not the same on all ranks, as a message; "": all is."""
    first = reports[0]["same"]
    for name in dict.fromkeys(name for report in reports for name in report["same"]):
        unlike = [rank for rank, report in enumerate(reports) if report["same"].get(name) != first.get(name)]
        if unlike:
            other = reports[unlike[0]]["same"].get(name)
            advice = "install the same on all nodes"
            if name in _ROWS:
                advice += f" {see(_ROWS[name])}"
            elif name.startswith("--"):
                advice = "give all ranks the same command"
            elif name.startswith("split") or name in ("classes", "checkpoint"):
                advice = "give all nodes the same files"
            return (
                f"the ranks differ in {name}: {first.get(name)} on {where(reports, 0)}, {other} on "
                f"{where(reports, unlike[0])}{_others(unlike)}; {advice}"
            )
    return ""


def assign_gpus(reports: list[Report], wanted: str) -> list[int | None]:
    """Number of each rank's GPU: the first that it sees and no other rank has. None for all ranks: the CPU.

    Where all ranks of a node see the same GPUs, it is the number of the local rank. Where each sees one of its own
    (--gpus-per-task, MIG), it is 0.

    Raises:
        InputError: some ranks have a GPU and others have none, or `wanted` is cuda and there is none.
    """
    taken: set[str] = set()
    given: list[int | None] = [None] * len(reports)
    for rank in sorted(range(len(reports)), key=lambda rank: (len(reports[rank]["gpus"]), rank)):
        for index, gpu in enumerate(reports[rank]["gpus"]):
            if gpu["uuid"] not in taken:
                taken.add(gpu["uuid"])
                given[rank] = index
                break
    without = [rank for rank, index in enumerate(given) if index is None]
    if not without or len(without) == len(reports) and wanted != "cuda":
        return given
    rank = without[0]
    host, seen = reports[rank]["host"], len(reports[rank]["gpus"])
    ranks = sum(report["host"] == host for report in reports)
    option = "--device cuda: " if wanted == "cuda" else ""
    raise InputError(
        f"{option}{where(reports, rank)}{_others(without)} has no GPU for itself: it sees {seen}, and {ranks} "
        f"rank{'s run' if ranks > 1 else ' runs'} there; start one rank per GPU, leave a broken node out "
        f"(sbatch --exclude={host}), or use --device cpu {see('gpu')}"
    )


def choose_kernels(reports: list[Report], gpus: list[int | None], settings: dict[str, Any]) -> str:
    """`fast` where all ranks can run the fast kernels, else `plain`. Raises InputError: some rank cannot, and must."""
    wanted = settings.get("kernels", "plain")
    reason = "" if wanted == "plain" else why_plain(reports, gpus, settings)
    if wanted == "fast" and reason:
        raise InputError(f"--kernels fast: {reason}; use --kernels plain")
    return "plain" if reason or wanted == "plain" else "fast"


def why_plain(reports: list[Report], gpus: list[int | None], settings: dict[str, Any]) -> str:
    """Why not all ranks can run the fast kernels; "": they can."""
    if gpus[0] is None:
        return "they need a CUDA GPU"
    if reason := fast.lacks(settings):
        return reason
    plain = [rank for rank, index in enumerate(gpus) if reports[rank]["gpus"][index]["plain"]]
    if not plain:
        return ""
    return f"{where(reports, plain[0])}{_others(plain)}: {reports[plain[0]]['gpus'][gpus[plain[0]]]['plain']}"


def warnings(reports: list[Report], gpus: list[int | None], settings: dict[str, Any]) -> Iterable[str]:
    """The warnings of rank 0: results are right, but training is slower than it could be."""
    if gpus[0] is not None:
        if settings.get("kernels") == "auto" and (reason := why_plain(reports, gpus, settings)):
            yield f"all ranks use the plain kernels, at about a third of the speed: {reason}" + (
                f" {see('compiler')}" if "compiler" in reason else ""
            )
        names = [report["gpus"][index]["name"] for report, index in zip(reports, gpus, strict=True)]
        yield from _unlike(reports, names, "have different GPUs", f"all wait for the slowest {see('gpu')}")
    decoders = [report["decoder"] for report in reports]
    yield from _unlike(
        reports,
        decoders,
        "decode JPEG files differently",
        f"pixels may differ by rounding, all wait for the slowest {see('decoder')}",
    )


def _unlike(reports: list[Report], values: list[str], what: str, effect: str) -> Iterable[str]:
    unlike = [rank for rank, value in enumerate(values) if value != values[0]]
    if unlike:
        yield (
            f"the ranks {what}: {values[0]} on {where(reports, 0)}, {values[unlike[0]]} on "
            f"{where(reports, unlike[0])}{_others(unlike)}; {effect}"
        )
