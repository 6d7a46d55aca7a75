"""What each stage of training allows on this machine, and which is the bottleneck: --recipe and --ranks.

In: short measurements of this node (the other rows, job.bench). Out: images/s of each stage and of all together, by the
model of job.scaling, which also says what it takes for granted.
"""

import dataclasses
import json
import math
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from job.doctor import libraries
from job.doctor.examine import Facts
from job.doctor.findings import SETUP, Finding, ok, slow
from shards import ROOT
from shards.errors import InputError
from shards.format.split import BARE
from shards.machine.cores import cores_given
from shards.machine.launcher import alone, launched_size

if TYPE_CHECKING:
    from job.config import Config
    from job.scaling.model import Model, Prediction
    from job.scaling.study import Measured

BENCH_SECONDS = 150.0
CPU_BATCH, GPU_BATCH = 16, 1024  # images per rank that are measured at most; the model knows how a step grows
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be predicted."""

    recipe: str
    precision: str  # "": that of the recipe
    ranks: int
    ranks_per_node: int

    @property
    def nodes(self) -> int:
        """Nodes that the ranks fill."""
        return math.ceil(self.ranks / self.ranks_per_node)


def check_limits(wanted: Wanted, facts: Facts, read: list[float], links: dict[str, float]) -> tuple[Finding, dict]:
    """The row `limits`, and its figures for --json.

    Args:
        read: images/s that each measured node reads, all at the same time; empty: no data was given.
        links: `within` and `between` nodes, bus bandwidth in byte/s, where measured.
    """
    try:
        from job.scaling import model  # noqa: F401
    except ModuleNotFoundError as error:
        text = f"not predicted: {error.name} is missing"
        return ok("limits", text, f"pip install alexnet-horovod[plots], or {SETUP}"), {}
    bench = _bench_step(wanted, facts)
    if "error" in bench:
        return slow("limits", f"not predicted: the training step cannot be measured ({bench['error']})", SETUP), {}
    return _predict(wanted, facts, bench, read, links)


def settings_of(wanted: Wanted, facts: Facts) -> "Config":
    """The settings of the recipe, for the network that the data asks for. Raises InputError."""
    from job import config

    values = config.read_flat(config.recipe_path(wanted.recipe))
    if wanted.precision:
        values["precision"] = wanted.precision
    classes = len(facts.split.classes) if facts.split else CLASSES
    values.update({"data": "none", "model.classes": values.get("model.classes") or classes})
    settings = config.from_flat(values)
    config.check(settings)
    if settings.global_batch < wanted.ranks:
        raise InputError(f"--ranks {wanted.ranks}: a batch of {settings.global_batch} images leaves some ranks without")
    return settings


def _bench_step(wanted: Wanted, facts: Facts) -> dict[str, Any]:
    """What `job.bench compute` measures of one rank, and `copy`: byte/s to the GPU; or {"error": why}."""
    settings = settings_of(wanted, facts)
    batch = min(max(1, settings.global_batch // wanted.ranks), GPU_BATCH if facts.gpus else CPU_BATCH)
    command = [sys.executable, "-m", "job.bench", "compute", "--recipe", wanted.recipe, "--batch", str(batch)]
    command += ["--classes", str(settings.model.classes), "--precision", settings.precision, "--json"]
    command += ["--steps", "5", "--rounds", "3", "--warmup", "2"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=BENCH_SECONDS,
            stdin=subprocess.DEVNULL,
            env=alone() | _without_mpi(facts) | _threads(wanted, facts),
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {BENCH_SECONDS:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
        return {"error": errors[-1] if errors else f"exit code {done.returncode}"}
    found = json.loads(done.stdout[done.stdout.index("{") :])
    if facts.gpus:
        found |= {"copy": libraries.probe("copy", "job.doctor.gpus").get("bytes_per_second")}
    return found


def _without_mpi(facts: Facts) -> dict[str, str]:
    """Lets Horovod run its single rank by Gloo: an MPI would look for the launcher that started this process."""
    if not facts.probes.get("horovod", {}).get("gloo"):
        return {}
    places = ("", "LOCAL_", "CROSS_")
    ranks = {f"HOROVOD_{place}{name}": value for place in places for name, value in (("RANK", "0"), ("SIZE", "1"))}
    return {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo", **ranks}


def _threads(wanted: Wanted, facts: Facts) -> dict[str, str]:
    """On CPUs a rank has its part of the node's cores only."""
    return {} if facts.gpus else {"OMP_NUM_THREADS": str(_cores_of_rank(wanted))}


def _cores_of_rank(wanted: Wanted) -> int:
    """Cores of one rank; alone, this process has the cores that all ranks of a node will share."""
    return max(1, cores_given().count // (wanted.ranks_per_node if launched_size() == 1 else 1))


def _predict(
    wanted: Wanted, facts: Facts, bench: dict[str, Any], read: list[float], links: dict[str, float]
) -> tuple[Finding, dict]:
    from job.scaling import model as scalingmodel
    from job.scaling.study import Measured

    settings = settings_of(wanted, facts)
    decode = _decode(facts, wanted)
    # Nodes that were not measured are taken to read as fast as those that were, all at the same time.
    storage = sum(read) / len(read) * wanted.nodes if read else math.inf
    model = dataclasses.replace(_model(settings, facts, bench, links), loader=decode, storage=storage)
    made = model.predict(
        scalingmodel.Scenario(wanted.ranks, settings.global_batch, wanted.ranks_per_node, parallel=settings.parallel)
    )
    step = Measured(wanted.ranks, wanted.nodes, settings.global_batch, made.sections, sum(made.sections.values()))
    part, advice = _bottleneck(step, made, decode * wanted.nodes, storage)
    figures = {
        "recipe": wanted.recipe,
        "precision": settings.precision,
        "ranks": wanted.ranks,
        "nodes": wanted.nodes,
        "global_batch": settings.global_batch,
        "stages": _stages(model, step, facts),
        "images_per_second": made.images_per_second,
        "low": made.low,
        "high": made.high,
        "bottleneck": part,
        "advice": advice,
        "assumed": _assumed(wanted, read, links),
    }
    return _finding(figures), figures


def _over() -> str:
    """What carries Horovod's messages where there are GPUs, or none."""
    import torch

    return "NCCL" if torch.cuda.is_available() else "MPI"


def _model(settings: "Config", facts: Facts, bench: dict[str, Any], links: dict[str, float]) -> "Model":
    """The model of job.scaling, fitted to the step of one rank and to links that were measured."""
    from job.run.breakdown import gradients
    from job.scaling import model as scalingmodel
    from job.scaling.study import COMPUTE, SECTIONS, TO_DEVICE, Gradient, Measured

    batch = bench["batch"]
    sections = dict.fromkeys(SECTIONS, 0.0) | {COMPUTE: batch / bench["images_per_second"]}
    if bench.get("copy"):
        sections[TO_DEVICE] = batch * settings.image_size**2 * 3 / bench["copy"]
    names = {"within": "local bandwidth", "between": "network bandwidth"}
    known = {name: links[kind] for kind, name in names.items() if kind in links}
    found = [Gradient(g["bytes"], g["ready"], g["name"], tuple(g["shape"])) for g in gradients(settings)]
    setup = scalingmodel.Setup(parallel=settings.parallel, over=_over())
    return scalingmodel.fit([Measured(1, 1, batch, sections, sum(sections.values()))], found, setup, known)


def _bottleneck(step: "Measured", made: "Prediction", decode: float, storage: float) -> tuple[str, str]:
    """The stage that limits a predicted step, and what to do; `decode`, `storage`: images/s of all nodes."""
    from job.scaling import report, sizes
    from job.scaling.model import DATA_BOUND
    from job.scaling.study import WAIT

    if step.sections[WAIT] <= DATA_BOUND * step.step:
        return report.bottleneck(sizes.Size(step, "", (), made.images_per_second, made.low, made.high), {})
    # Reading overlaps with all else, so it is slower than that, however short the wait.
    work = step.global_batch / (step.step - step.sections[WAIT])
    reading = min(decode, storage)
    advice = f"It gives {reading:,.0f} images/s, and the rest could take {work:,.0f}: {report.ADVICE[WAIT]}."
    return "decode" if decode < storage else "storage", advice


def _stages(model: "Model", step: "Measured", facts: Facts) -> dict[str, float]:
    """Images/s, all ranks, that each stage alone would allow; those that never limit are left out."""
    from job.scaling import report

    rates = report.part_limits(model, step)
    names = {"reading": "file system", "decoding": "loader", "copy to the GPU": "copy to the device"}
    names |= {"compute": "compute", "allreduce": "allreduce"}
    if not facts.gpus:
        del names["copy to the GPU"]
    return {name: rates[part] for name, part in names.items() if part in rates}


def _decode(facts: Facts, wanted: Wanted) -> float:
    """Images/s that the readers of a node decode: all its ranks have as many cores as this one."""
    if facts.split is not None and facts.split.encoding in BARE:
        return math.inf
    readers = max(1, _cores_of_rank(wanted) - 1)
    return facts.decode * readers * wanted.ranks_per_node if facts.decode else math.inf


def _assumed(wanted: Wanted, read: list[float], links: dict[str, float]) -> list[str]:
    """What the prediction takes for granted because it was not measured here."""
    from job.scaling import model

    over, found = _over(), []
    if not read:
        found.append("reading is no limit (--data measures it)")
    elif wanted.nodes > len(read):
        found.append(f"the file system gives each of {wanted.nodes} nodes what it gave each of {len(read)}")
    if wanted.nodes > 1 and "between" not in links:
        found.append(f"between nodes {model.assumed_network(over).partition(' (')[0]}")
    if wanted.ranks_per_node > 1 and "within" not in links:
        gigabytes = model.priors_of(over)["local bandwidth"][0] / 1e9
        found.append(f"within a node {gigabytes:.0f} GB/s")
    return found


def _finding(figures: dict[str, Any]) -> Finding:
    stages = ", ".join(f"{name} {rate:,.0f}" for name, rate in figures["stages"].items())
    text = (
        f"{figures['recipe']}, {figures['precision']}, {figures['ranks']} ranks on {figures['nodes']} "
        f"node{'s' * (figures['nodes'] > 1)}, {figures['global_batch']:,} images per step: all stages together "
        f"{figures['images_per_second']:,.0f} images/s ({figures['low']:,.0f} to {figures['high']:,.0f}); "
        f"alone: {stages}"
    )
    if figures["assumed"]:
        text += f"; assumed: {'; '.join(figures['assumed'])}"
    return ok("limits", text, f"bottleneck: {figures['bottleneck']}. {figures['advice']}")
