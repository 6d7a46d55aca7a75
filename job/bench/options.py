"""The command lines of all subjects of job.bench. Nothing here loads torch, so that --help is fast."""

import argparse
from collections.abc import Callable
from typing import NamedTuple


class Subject(NamedTuple):
    """What can be measured."""

    module: str  # it has measure(arguments) -> dict or None, and text(result) -> str
    description: str
    add_options: Callable[[argparse.ArgumentParser], None]
    of_ranks: bool  # the ranks of horovodrun measure it together, and rank 0 has the result


LOADER = (
    "Images/s of reading, decoding and cropping, as training does it, into the memory from which the GPU copies. "
    "Without --data, 2,048 synthetic photographs of 256x256 are packed first (1/f noise, JPEG quality 90, about 27 KB "
    "each)."
)

STEP = (
    "Images/s of the training step on synthetic images that lie on the device, reading left out. Start it under "
    "horovodrun to measure all ranks with the allreduce, beside the same step without it."
)

ALLREDUCE = "Latency and bus bandwidth of an allreduce among the ranks of horovodrun, by size of the message."


def add_loader_options(parser: argparse.ArgumentParser) -> None:
    """Options of the subject `loader`."""
    parser.add_argument("--data", default="", metavar="DIR", help="folder of shards; empty: synthetic ones")
    parser.add_argument("--split", default="train", metavar="NAME")
    parser.add_argument("--workers", type=int, default=-1, metavar="W", help="reader processes; -1: by the cores given")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images per batch")
    parser.add_argument("--crop", type=int, default=227, metavar="PX")
    parser.add_argument("--encoding", choices=("jpeg", "raw", "planes"), default="jpeg", help="of the synthetic shards")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of them; the median counts")


def add_step_options(parser: argparse.ArgumentParser) -> None:
    """Options of the subjects `compute` and `train`."""
    parser.add_argument("--recipe", default="paper", metavar="NAME", help="recipe in job/recipes, or a YAML file")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images per rank")
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


def add_allreduce_options(parser: argparse.ArgumentParser) -> None:
    """Options of the subject `allreduce`."""
    parser.add_argument("--largest", type=int, default=256, metavar="MIB", help="largest message, in MiB")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


SUBJECTS = {
    "loader": Subject("job.bench.loader", LOADER, add_loader_options, of_ranks=False),
    "compute": Subject("job.bench.step", STEP, add_step_options, of_ranks=True),
    "allreduce": Subject("job.bench.allreduce", ALLREDUCE, add_allreduce_options, of_ranks=True),
    "train": Subject("job.bench.step", STEP, add_step_options, of_ranks=True),
}
