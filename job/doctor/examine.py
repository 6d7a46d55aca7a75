"""The checks of one node in the order of the report, each with a time limit, so that none can hang.

In: a folder of shards, or none; ranks on this node. Out: findings, each as soon as it is known; and `Facts`, figures
that the limits of the stages are computed from.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from job.doctor import gpus, libraries, machine
from job.doctor.findings import Finding, wrong
from shards.errors import InputError

if TYPE_CHECKING:
    from shards.format.split import Split

SECONDS = 30.0  # of a check


@dataclasses.dataclass
class Facts:
    """What checks leave for later ones. Rates are 0 where nothing was measured."""

    probes: dict[str, Any] = dataclasses.field(default_factory=dict)
    decode: float = 0.0  # images/s per core
    read: float = 0.0  # images/s of this node's reading
    split: "Split | None" = None
    problem: str = ""  # why the split cannot be opened

    @property
    def gpus(self) -> int:
        """GPUs that torch can use."""
        return len(self.probes.get("torch", {}).get("gpus", ()))


def limited(name: str, seconds: float, check: Callable[[], Any]) -> list[Finding]:
    """The findings of a check, or one that says that it failed or gave no answer. Raises InputError.

    It runs in a thread: a call that hangs in the file system cannot be ended, only left behind.
    """
    answers: queue.Queue = queue.Queue()

    def work() -> None:
        try:
            answers.put(check())
        except BaseException as error:
            answers.put(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except queue.Empty:
        return [wrong(name, f"no answer in {seconds:.0f} s", "the file system or the driver hangs; try another node")]
    if isinstance(found, InputError):
        raise found
    if isinstance(found, BaseException):
        return [wrong(name, f"the check failed: {type(found).__name__}: {found}")]
    return [found] if isinstance(found, Finding) else list(found)


def examine(
    data: str | None, facts: Facts, ranks: int = 1, at: Callable[[str], None] = lambda name: None
) -> Iterator[Finding]:
    """The findings of this node; fills in `facts`.

    Args:
        ranks: on this node.
        at: is called with the name of each check before it begins.
    """
    probing = _start_probes(facts)
    for name, check in _checks(data, facts, ranks):
        at(name)
        if name == "torch":  # from here on, checks need what the libraries said
            probing.join(libraries.PROBE_SECONDS)
        yield from limited(name, SECONDS, check)


def open_split(data: str, facts: Facts) -> None:
    """Open the training split into `facts`. Raises InputError."""
    from shards.format.split import load_split

    found = limited("data", SECONDS, lambda: [setattr(facts, "split", load_split(data, "train"))][:0])
    if found:
        facts.problem = found[0].text


def _start_probes(facts: Facts) -> threading.Thread:
    """Ask all libraries at the same time, in processes of their own."""
    names = (*libraries.PROBES, "nvml")

    def ask(name: str) -> None:
        module = gpus if name == "nvml" else libraries
        facts.probes[name] = libraries.probe(name, module.__name__)

    def work() -> None:
        threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(libraries.PROBE_SECONDS)

    probing = threading.Thread(target=work, name="probes", daemon=True)
    probing.start()
    return probing


def _checks(data: str | None, facts: Facts, ranks: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and function of each check."""

    def said(name: str) -> dict[str, Any]:
        return facts.probes.get(name, {"error": f"no answer in {libraries.PROBE_SECONDS} s"})

    def decoder() -> Finding:
        finding, facts.decode = machine.check_decoder()
        return finding

    def gpu_details() -> list[Finding]:
        driver = bool(said("torch").get("gpus")) or "error" not in said("nvml")
        return gpus.check_gpus(said("nvml")) if driver else []

    yield "python", libraries.check_python
    yield "code", libraries.check_code
    yield "torch", lambda: libraries.check_torch(said("torch"))
    yield "clocks", gpu_details
    yield "horovod", lambda: libraries.check_horovod(said("horovod"), said("torch"))
    yield "mpirun", lambda: libraries.check_mpi(said("horovod"), said("mpi4py"))
    yield "webdataset", libraries.check_webdataset
    yield "tensorboard", libraries.check_tensorboard
    yield "decoder", decoder
    yield "cores", lambda: machine.check_cores(ranks)
    yield "memory", lambda: machine.check_memory(ranks)
    yield "shm", machine.check_shm
    yield "caches", lambda: machine.check_caches(bool(facts.gpus))
    yield "files", machine.check_limits
    yield "network", machine.check_network
    yield "slurm", machine.check_slurm
    if data is not None:
        yield "data", lambda: check_data(data, facts, ranks)


def check_data(data: str, facts: Facts, ranks: int) -> Finding:
    """The finding about the shards, also where they cannot be opened on this node."""
    if facts.split is None and not facts.problem:
        try:
            open_split(data, facts)
        except InputError as error:
            facts.problem = str(error)
    if facts.split is None:
        return wrong("data", facts.problem, "all nodes need the same shards; is that folder on all of them?")
    finding = machine.check_data(facts.split, facts.decode, ranks)
    facts.read = finding.value or 0.0
    return finding
