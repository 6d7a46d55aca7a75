"""Studies made up for the tests of job.scaling: timing files as 1 to 64 ranks would leave them.

In: what the made-up machine is like. Out: a study folder. The times come from other formulas than
those of the model under test, with noise.
"""

import json
import math
import random
from pathlib import Path

from job.scaling.study import (
    COMPUTE,
    EXPOSED,
    REST,
    TO_DEVICE,
    UPDATE,
    WAIT,
    Plan,
    create,
    points_of,
    save_point,
)

# AlexNet's layers as gradients become ready: bytes of weights, and share of the backward pass that is over then.
LAYERS = (
    ("fc8.weight", (1000, 4096), 0.01), ("fc7.weight", (4096, 4096), 0.03), ("fc6.weight", (4096, 9216), 0.09),
    ("conv5.weight", (256, 192, 3, 3), 0.2), ("conv4.weight", (384, 192, 3, 3), 0.35),
    ("conv3.weight", (384, 256, 3, 3), 0.55), ("conv2.weight", (256, 48, 5, 5), 0.9),
    ("conv1.weight", (96, 3, 11, 11), 1.0),
)  # fmt: skip
GRADIENTS = [
    {"name": name, "shape": list(shape), "bytes": 4 * math.prod(shape), "ready": ready} for name, shape, ready in LAYERS
]
ENVIRONMENT = {
    "device": "Made-up GPU",
    "cores": 16,
    "threads": 1,
    "ranks_per_node": 4,
    "nodes": 1,
    "network": ["ib0 100 Gb/sec (4X EDR)"],
    "horovod_over": "NCCL",
    "versions": {"python": "3.11", "torch": "2.13.0", "horovod": "0.28.1", "cuda": "13.0", "nccl": "2.28"},
    "tuning": {"HOROVOD_CYCLE_TIME": "1"},
    "file_system": "lustre",
    "commit": "0123456789ab",
}


def sections(ranks: int, batch: int, *, per_node=4, network=10e9, local=100e9, image=40e-6, loader=math.inf):
    """Seconds of a step's sections on a made-up machine; ring over the slower link, two thirds of it overlapped."""
    images = batch / ranks
    nodes = math.ceil(ranks / per_node)
    compute = 0.5e-3 + image * images
    nbytes = sum(g["bytes"] for g in GRADIENTS)
    bandwidth = network if nodes > 1 else local
    wire = 0.0 if ranks == 1 else 1e-3 + 2 * (ranks - 1) * 5e-6 + 2 * (ranks - 1) / ranks * nbytes / bandwidth
    exposed = max(0.0, wire - 0.6 * compute)
    rest = {TO_DEVICE: 1e-6 * images, COMPUTE: compute, EXPOSED: exposed, UPDATE: 1.2e-3, REST: 0.1e-3}
    step = sum(rest.values())
    wait = max(0.0, images * min(per_node, ranks) / loader - step)
    return {WAIT: wait, **rest}


def timings(
    ranks: int, batch: int, seed: int = 0, noise: float = 0.01, slow: int = -1, per_node: int = 4, **machine
) -> dict:
    """timings.json of a run; rank `slow` computes a fifth longer."""
    chance = random.Random(seed * 1000 + ranks)
    true = sections(ranks, batch, per_node=per_node, **machine)
    run = chance.gauss(1, noise)
    found = []
    for rank in range(ranks):
        mean = {name: value * run * max(0.5, chance.gauss(1, noise)) for name, value in true.items()}
        mean[EXPOSED] = true[EXPOSED] * run  # an allreduce ends at the same time on all ranks
        if rank == slow:
            mean[COMPUTE] *= 1.2
        found.append(
            {
                "rank": rank,
                "host": f"node{rank // per_node}",
                "mean": mean,
                "median": mean,
                "p95": {name: 1.1 * value for name, value in mean.items()},
            }
        )
    last = max(r["mean"][COMPUTE] for r in found)
    for r in found:  # early ranks wait in the allreduce
        r["mean"][EXPOSED] += (last - r["mean"][COMPUTE]) if ranks > 1 else 0.0
    low = {name: min(r["mean"][name] for r in found) for name in true}
    high = {name: max(r["mean"][name] for r in found) for name in true}
    return {
        "steps": 90,
        "global_batch": batch,
        "epochs": 65,
        "nsamples": 1281167,
        "parallel": "gradients",
        "step_seconds": {"mean": sum(true.values()), "std": 0.02 * sum(true.values())},
        "ranks": found,
        "fastest": low,
        "slowest": high,
        "gradients": GRADIENTS,
        "environment": ENVIRONMENT,
    }


def write_study(
    path: Path,
    sizes=(1, 2, 4, 8, 16, 32, 64),
    repeats=3,
    modes=("strong", "weak"),
    batch=512,
    data="shards",
    per_node=4,
    **machine,
) -> Path:
    """A study of `sizes` ranks with its points, as `job.scaling run` leaves it."""
    plan = Plan(
        sizes=tuple(sizes), modes=tuple(modes), data=(data,), global_batch=batch, repeats=repeats, steps=100, seed=1
    )
    create(str(path), plan)
    for point in points_of(plan):
        fields = timings(point.ranks, point.global_batch, point.repeat, per_node=per_node, **machine)
        point.nodes, point.status, point.timings = math.ceil(point.ranks / per_node), "done", fields
        point.command = f"horovodrun -np {point.ranks} python -m job.train"
        save_point(str(path), point)
    return path


def edit_point(study: Path, name: str, change) -> None:
    """Change the JSON of the point whose name begins so."""
    file = next((study / "points").glob(f"{name}*.json"))
    fields = json.loads(file.read_text())
    change(fields)
    file.write_text(json.dumps(fields))
