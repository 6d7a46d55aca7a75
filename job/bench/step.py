"""Speed of the training step alone, on images that lie on the device: the subjects `compute` and `train` of job.bench.

In: a recipe, a batch per rank. Out: images/s, and what the timers of job.train cost. `compute` leaves communication out
and measures the fast kernels beside their plain twin; `train`, under horovodrun, measures all ranks with the allreduce,
beside the same step without it. What is compared is measured in turns, in one run.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import horovod.torch as hvd
import torch

from job import config
from job.network.alexnet import build
from job.ranks import agree
from job.run.step import Step
from job.run.timing import StepTimer
from job.usage import words
from job.usage.flops import Flops
from shards.errors import InputError
from shards.machine.facts import cpu_and_cores, versions
from shards.machine.progress import Progress


def measure(arguments: argparse.Namespace) -> dict | None:
    """Measure on all ranks; rank 0 returns the fields of the JSON object.

    Raises:
        InputError: a value that no measurement can have, or no GPU where one is wanted.
    """
    settings = read_settings(arguments)
    agreed = agree.agree({**config.to_flat(settings), **vars(arguments)})
    device, kernels = agreed.device, agreed.kernels
    steps = {"alone": make_step(settings, arguments.batch, kernels, False, device)}
    if arguments.subject == "train" and hvd.size() > 1:
        steps["together"] = make_step(settings, arguments.batch, kernels, True, device)
    if arguments.subject == "compute" and kernels == "fast":
        steps["plain"] = make_step(settings, arguments.batch, "plain", False, device)
    main = "together" if "together" in steps else "alone"
    steps["timed"] = functools.partial(steps[main], StepTimer(device))
    rounds = measure_in_turns(steps, arguments, device)
    if hvd.rank():
        return None
    rate = Flops(build(settings), device, settings.precision).rate
    return describe(rounds, main, settings, arguments, kernels, device) | rate(
        statistics.median(rounds[main]), hvd.size()
    )


def read_settings(arguments: argparse.Namespace) -> config.Config:
    """The settings of the recipe with those of the command line. Raises InputError."""
    for name in ("batch", "classes", "steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} is {getattr(arguments, name)}; it must be 1 or more")
    values = config.read_flat(config.recipe_path(arguments.recipe))
    for name in ("precision", "kernels", "parallel", "wire"):
        values[name] = getattr(arguments, name)
    values.update({"data": "none", "model.classes": arguments.classes})
    if arguments.image_size:
        values["image-size"] = arguments.image_size
    settings = config.from_flat(values)
    config.check(settings)
    return settings


def measure_in_turns(
    steps: dict[str, Callable], arguments: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Images/s of all ranks together for each kind of step, one value per round. All ranks call it together."""
    rates: dict[str, list[float]] = {name: [] for name in steps}
    total = len(steps) * (arguments.warmup + arguments.rounds * arguments.steps)
    shown = Progress(total, "steps", arguments.subject)

    def run(step: Callable, count: int) -> None:
        for _ in range(count):
            step()
            if hvd.rank() == 0:
                shown.add(1)

    for step in steps.values():
        run(step, arguments.warmup)
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            hvd.barrier()
            rates[name].append(timed(functools.partial(run, step), arguments.steps, device) * arguments.batch)
    shown.close()
    # Without communication the ranks do not wait for each other: the slowest counts.
    of_ranks = hvd.allgather_object(rates, name="bench_rates")
    return {name: [hvd.size() * min(r[name][i] for r in of_ranks) for i in range(arguments.rounds)] for name in rates}


def describe(
    rounds: dict[str, list[float]],
    main: str,
    settings: config.Config,
    arguments: argparse.Namespace,
    kernels: str,
    device: torch.device,
) -> dict:
    """The JSON object: `main` names the kind of step that counts, the others are compared with it."""
    result = {
        "subject": arguments.subject,
        "images_per_second": statistics.median(rounds[main]),
        "rounds": rounds[main],
        "ranks": hvd.size(),
        "batch": arguments.batch,
        "recipe": arguments.recipe,
        "image_size": settings.image_size,
        "precision": arguments.precision,
        "kernels": kernels,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_and_cores(),
        "versions": versions(),
    }
    pairs = zip(rounds[main], rounds["timed"], strict=True)
    result["timer_cost"] = statistics.median(without / with_timer - 1 for without, with_timer in pairs)
    if device.type == "cuda":
        result["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    if "plain" in rounds:
        result["images_per_second_plain"] = statistics.median(rounds["plain"])
        result["rounds_plain"] = rounds["plain"]
    if "together" in rounds:
        result["parallel"] = arguments.parallel
        result["images_per_second_without_allreduce"] = statistics.median(rounds["alone"])
        result["efficiency"] = result["images_per_second"] / result["images_per_second_without_allreduce"]
    return result


def make_step(settings: config.Config, batch: int, kernels: str, together: bool, device: torch.device) -> Callable:
    """A function that makes one training step of a network of its own on `batch` random crops of uint8.

    Args:
        together: the ranks act together; otherwise each trains for itself.

    Returns: a function that takes a StepTimer, or None.
    """
    side = settings.image_size
    mean = torch.full((side, side, 3), 127.5, device=device)
    training = Step(settings, device, kernels, batch, mean, together)
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    offsets = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    mirror = torch.arange(batch, device=device) % 2 == 0
    labels = torch.randint(settings.model.classes, (batch,), device=device)

    def step(timer=None) -> None:
        crops = training.prepare(images, offsets, mirror)
        if not timer:
            training.run(crops, labels, 0)
            return
        timer.start(0.0)
        training.run(crops, labels, 0, timer.mark)
        timer.end()

    return step


def timed(run: Callable[[int], None], count: int, device: torch.device) -> float:
    """Steps per second of `run(count)`, with the device's queue empty before and after."""

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    drain()
    began = time.perf_counter()
    run(count)
    drain()
    return count / (time.perf_counter() - began)


def text(result: dict) -> str:
    """The result for a reader."""
    low, high = min(result["rounds"]), max(result["rounds"])
    lines = [
        f"{result['recipe']} at {result['image_size']} px, {result['precision']}, {result['kernels']} kernels, "
        f"{result['ranks']} x {result['batch']} images per step, {result['device']}",
        f"{result['images_per_second']:,.1f} images/s (rounds {low:,.1f} to {high:,.1f}), {words.flops(result)}",
    ]
    if "images_per_second_plain" in result:
        plain = result["images_per_second_plain"]
        lines.append(
            f"plain kernels {plain:,.1f} images/s: the fast ones are {result['images_per_second'] / plain:.2f} times "
            f"as fast"
        )
    if "efficiency" in result:
        lines.append(
            f"without the allreduce {result['images_per_second_without_allreduce']:,.1f} images/s: efficiency "
            f"{result['efficiency']:.1%}"
        )
    lines.append(f"timers of job.train: {result['timer_cost']:+.2%} of a step's time")
    return "\n".join(lines)
