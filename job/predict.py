"""Classes of images by a trained network: `python -m job.predict RUN IMAGE...`.

In: a run directory or a checkpoint; images as files, folders, tars, folders of shards, or - for standard input. Out: a
line per image, or a JSON object per image with --json. Images are prepared as in validation, so that the file that a
sample was packed from gets the class that job.evaluate finds.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from job.inference.options import add_network
from shards.command import Parser, run
from shards.errors import InputError, printable

if TYPE_CHECKING:
    from job.inference.trained import Guess, TrainedNetwork
    from shards.read.inputs import Input

DESCRIPTION = """\
The most likely classes of images. IMAGE is an image file; a folder (its images and those below it, sorted); a tar of
samples; a folder of shards with its index, or the index of one split (DATA/val.json); or - for a file on stdin."""
EPILOG = """\
An image that cannot be decoded is named on stderr (with --json also in a line of its own, as "error"), counted at the
end, and left out; the exit code is 2 only if none could be used."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(
        prog="python -m job.predict",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_network(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders, tars, folders of shards, -")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="classes per image, the most likely first [5]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image, one per line")
    options = parser.parse_args(arguments)
    if options.top < 1:
        raise InputError("--top must be 1 or more")
    return options


def predict(options: argparse.Namespace) -> None:
    """Print the classes of all images. Raises InputError if none can be used."""
    from job.inference.trained import BATCH, load_network, use_given_cores
    from shards.read.inputs import inputs

    named = inputs(options.images)
    use_given_cores()
    network = load_network(options.run, options.checkpoint, options.device)
    reached = "" if network.best_top1 is None else f", best top-1 in validation {network.best_top1:.2%}"
    print(f"network: {network.path}, step {network.step}{reached}", file=sys.stderr, flush=True)
    good = bad = 0
    for batch in batched(named, BATCH):
        for image, guesses, problem in guess(network, batch, options.top):
            if problem:
                bad += 1
                print(f"warning: {printable(image.name)}: {problem}", file=sys.stderr, flush=True)
            else:
                good += 1
            if options.json:
                print(json.dumps(record(image, guesses, problem)))
            elif guesses:
                print(line(image, guesses))
        sys.stdout.flush()
    if not good:
        raise InputError(f"none of the {bad:,} images could be used; stderr names them")
    if bad:
        print(f"{good:,} images, and {bad:,} that could not be used", file=sys.stderr)


def batched(named: "Iterable[Input]", size: int) -> "Iterator[tuple[Input, ...]]":
    """The images in groups of `size`."""
    source = iter(named)
    while batch := tuple(itertools.islice(source, size)):
        yield batch


def guess(network: "TrainedNetwork", batch: "Iterable[Input]", top: int) -> "Iterator[tuple[Input, list[Guess], str]]":
    """Each image with its likely classes, or with the reason why there are none; in the order given."""
    import torch

    from shards.read.images import BadImage

    prepared, problems = [], []
    for image in batch:
        problem = image.problem
        if not problem:
            try:
                prepared.append(network.preprocess(image.data))
            except BadImage as error:
                problem = str(error)
        problems.append((image, problem))
    found = iter(network.guess(torch.stack(prepared), top) if prepared else [])
    for image, problem in problems:
        yield image, [] if problem else next(found), problem


def record(image: "Input", guesses: "list[Guess]", problem: str) -> dict:
    """What --json prints of an image."""
    about = {"image": image.name}
    if image.truth:
        about["truth"] = image.truth
    if problem:
        return about | {"error": problem}
    return about | {
        "top": [{"class": g.name, "label": g.label, "probability": round(g.probability, 6)} for g in guesses]
    }


def line(image: "Input", guesses: "list[Guess]") -> str:
    """The classes of an image as one line."""
    classes = ", ".join(f"{guess.probability:.1%} {printable(guess.name)}" for guess in guesses)
    truth = f" (it is {printable(image.truth)})" if image.truth else ""
    return f"{printable(image.name)}: {classes}{truth}"


if __name__ == "__main__":
    run(lambda: predict(parse()))
