"""Speed of the training step alone, on images that lie on the device: the subjects `compute` and `train` of job.bench.

In: a recipe, a batch a rank. Out: images/s, and what the timers of job.train cost. `compute` leaves out communication,
and measures the fast kernels beside their plain twin; `train`, under horovodrun, is all ranks with the allreduce,
beside the same step without it. What is compared is measured in turns in one run.
"""

import functools
import statistics
import time

DESCRIPTION = (
    "Images/s of the training step on synthetic images that lie on the device, reading left out. Start it under "
    "horovodrun to measure all ranks with the allreduce, beside the same step without it."
)


def add_options(parser) -> None:
    """The command line of this subject."""
    parser.add_argument("--recipe", default="paper", metavar="NAME", help="recipe in job/recipes, or a YAML file")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images a rank")
    parser.add_argument("--image-size", type=int, default=0, metavar="PX", help="0: that of the recipe")
    parser.add_argument("--classes", type=int, default=1000, metavar="N")
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    parser.add_argument("--kernels", choices=("auto", "plain", "fast"), default="auto")
    parser.add_argument("--parallel", choices=("gradients", "weights"), default="gradients")
    parser.add_argument("--wire", choices=("fp32", "fp16"), default="fp32", help="type in which gradients travel")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of them; the median counts")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before the first measurement")


def measure(arguments) -> dict | None:
    """Measure on all ranks; rank 0 returns the fields of the JSON object.

    Raises:
        InputError: a value that no measurement can have, or no GPU where one is wanted.
    """
    from job import config
    from shards.errors import InputError

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

    import horovod.torch as hvd
    import torch

    from job.ranks.agree import agree
    from job.run.step import set_determinism, set_precision
    from job.run.timing import StepTimer
    from shards.machine.facts import cpu_and_cores, versions
    from shards.machine.progress import Progress

    agreed = agree(vars(arguments))
    device, kernels = agreed.device, agreed.kernels
    set_determinism(False)
    set_precision(settings.precision)
    steps = {"alone": make_step(settings, arguments.batch, kernels, False, device)}
    if arguments.subject == "train" and hvd.size() > 1:
        steps["together"] = make_step(settings, arguments.batch, kernels, True, device)
    if arguments.subject == "compute" and kernels == "fast":
        steps["plain"] = make_step(settings, arguments.batch, "plain", False, device)
    main = "together" if "together" in steps else "alone"
    steps["timed"] = functools.partial(steps[main], StepTimer(device))
    rates: dict[str, list[float]] = {name: [] for name in steps}
    total = len(steps) * (arguments.warmup + arguments.rounds * arguments.steps)
    shown = Progress(total, "steps", arguments.subject)

    def tell(step) -> None:
        step()
        if hvd.rank() == 0:
            shown.add(1)

    steps = {name: functools.partial(tell, step) for name, step in steps.items()}
    for step in steps.values():
        for _ in range(arguments.warmup):
            step()
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            hvd.barrier()
            rates[name].append(timed(step, arguments.steps, device) * arguments.batch)
    shown.close()
    # Ranks without communication do not wait for each other: the slowest counts.
    sums = hvd.allgather_object(rates, name="bench_rates")
    if hvd.rank():
        return None
    rounds = {name: [hvd.size() * min(r[name][i] for r in sums) for i in range(arguments.rounds)] for name in rates}
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
    result["timer_cost"] = statistics.median(without / timed_ - 1 for without, timed_ in pairs)
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


def make_step(settings, batch: int, kernels: str, together: bool, device):
    """A function that makes one training step of a network of its own on `batch` random crops of uint8.

    `together`: with the ranks' strategy; otherwise each rank for itself. The function takes a StepTimer, or None.
    """
    import torch

    from job.network.alexnet import build
    from job.ranks.average import Alone, make_strategy
    from job.run.step import make_optimizer, make_pass
    from job.run.timing import COMPUTE, EXPOSED, UPDATE

    model = build(settings).to(device).train()
    optimizer = make_optimizer(settings, model, kernels)
    if together:
        strategy = make_strategy(settings, model, optimizer, autograd=kernels == "plain")
    else:
        strategy = Alone(optimizer)
    side = settings.image_size
    images = torch.randint(0, 256, (batch, side, side, 3), dtype=torch.uint8, device=device)
    offsets = torch.zeros(batch, 2, dtype=torch.int32, device=device)
    mirror = torch.arange(batch, device=device) % 2 == 0
    mean = torch.full((side, side, 3), 127.5, device=device)
    labels = torch.randint(settings.model.classes, (batch,), device=device)
    this_pass = make_pass(settings, model, strategy, mean, kernels, batch)

    def step(timer=None) -> None:
        mark = timer.mark if timer else lambda section: None
        crops = this_pass.prepare(images, offsets, mirror)
        if timer:
            timer.start(0.0)
        this_pass.run(crops, labels, 1)
        mark(COMPUTE)
        strategy.communicate()
        mark(EXPOSED)
        strategy.update()
        mark(UPDATE)
        strategy.after_update(0)
        mark(EXPOSED)
        if timer:
            timer.end()

    return step


def timed(step, count: int, device) -> float:
    """Steps a second over `count` steps, the device's queue empty before and after."""
    import torch

    def drain() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    drain()
    began = time.perf_counter()
    for _ in range(count):
        step()
    drain()
    return count / (time.perf_counter() - began)


def text(result: dict) -> str:
    """The result for a reader."""
    low, high = min(result["rounds"]), max(result["rounds"])
    lines = [
        f"{result['recipe']} at {result['image_size']} px, {result['precision']}, {result['kernels']} kernels, "
        f"{result['ranks']} x {result['batch']} images a step, {result['device']}",
        f"{result['images_per_second']:,.1f} images/s (rounds {low:,.1f} to {high:,.1f})",
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
