"""Accuracy of a checkpoint on a split of shards: `python -m job.evaluate RUN --data DIR`, on any number of ranks.

In: a run directory or a checkpoint, and shards. Out: a line of text, JSON with --json, CSV files with --per-class and
--per-sample.
"""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from job.inference.options import add_network
from shards.command import Parser, run
from shards.errors import InputError
from shards.machine.files import check_writable, write_whole

if TYPE_CHECKING:
    import torch

    from job.batches.loader import Loader
    from job.config import Config
    from job.inference.outcomes import Outcomes
    from job.run.checkpoint import RunState
    from shards.format.split import Split


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(prog="python -m job.evaluate", description="Accuracy of a trained network on a split of shards.")
    add_network(parser)
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of shards")
    parser.add_argument("--split", default="val", help="split to evaluate [val]")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="images per step and rank [as in training]")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="reader processes per rank; -1: by cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--data.max-bad-fraction",
        dest="max_bad_fraction",
        type=float,
        metavar="X",
        help="share of undecodable samples above which the evaluation fails [as in training]",
    )
    parser.add_argument(
        "--crops",
        type=int,
        choices=(1, 10),
        default=1,
        help="10: average over corners, centre and their mirror images, as Krizhevsky et al. 2012 [1: the centre]",
    )
    parser.add_argument("--per-class", metavar="FILE.csv", help="write accuracy and worst confusion of each class")
    parser.add_argument("--per-sample", metavar="FILE.csv", help="write what the network made of each image")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.batch < 0 or options.workers < -1:
        raise InputError("--batch must be 0 or more and --workers -1 or more")
    if options.per_class and options.per_class == options.per_sample:
        raise InputError(f"--per-class and --per-sample both write {options.per_class}; give two files")
    if options.max_bad_fraction is not None and not 0 <= options.max_bad_fraction <= 1:
        raise InputError(f"--data.max-bad-fraction is {options.max_bad_fraction}; it must be from 0 to 1")
    return options


def evaluate(options: argparse.Namespace) -> None:
    """Measure on all ranks together; rank 0 prints. Raises InputError."""
    import horovod.torch as hvd

    from job import config
    from job.batches.data import match_classes, match_size, split_facts
    from job.inference.outcomes import Outcomes
    from job.inference.scores import check_ten_crops
    from job.network.precision import set_precision
    from job.ranks.agree import agree
    from job.run import checkpoint
    from job.run.validation import validate
    from shards.format.split import load_split

    def open_data():
        """The split and the checkpoint; and what must be the same on all ranks."""
        for file in filter(None, (options.per_class, options.per_sample)) if hvd.rank() == 0 else ():
            check_writable(file)
        split = load_split(options.data, options.split)
        path, state = checkpoint.load_named(options.run, options.checkpoint)
        facts = {**split_facts(split, mean=False), "checkpoint": f"step {state.step}"}
        settings = config.from_flat(state.config, path)
        relabel = match_classes(split, state.classes, settings.model.classes, path)
        problem = match_size(split, settings.image_size, state.image)
        side = check_ten_crops(split, settings.image_size) if options.crops == 10 else settings.image_size
        return (split, path, state, settings, relabel, problem, side), facts

    agreed = agree(vars(options), open_data)
    device, (split, path, state, settings, relabel, problem, side) = agreed.device, agreed.found
    if problem and hvd.rank() == 0:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    set_precision(settings.precision)
    model, mean = checkpoint.network(state, path).to(device), state.mean
    if options.crops == 10:
        model, mean = ten_crops(model, split, mean, side, quiet=hvd.rank() > 0).to(device), None
    outcomes = Outcomes()
    with make_loader(options, split, settings, side, pin=device.type == "cuda") as loader:
        relabel = None if relabel is None else relabel.to(device)

        def observe(batch, scores, labels) -> None:
            if options.per_class or options.per_sample:
                outcomes.add(loader.validation_samples(batch.step), scores, labels)

        result = validate(model, loader, mean, device, settings.precision, relabel=relabel, observe=observe)
        if options.per_class or options.per_sample:
            write_tables(options, outcomes, loader, state, settings)
    if hvd.rank() == 0:
        result = {"checkpoint": path, "split": options.split, "step": state.step, "crops": options.crops, **result}
        print(json.dumps(result) if options.json else text(result), flush=True)


def make_loader(options: argparse.Namespace, split: "Split", settings: "Config", side: int, pin: bool) -> "Loader":
    """This rank's part of the split, as centre squares of `side` pixels."""
    import horovod.torch as hvd

    from job.batches.loader import Loader

    batch = options.batch or max(1, settings.global_batch // hvd.size())
    bad = settings.stream.max_bad_fraction if options.max_bad_fraction is None else options.max_bad_fraction
    return Loader(
        split,
        rank=hvd.rank(),
        world_size=hvd.size(),
        global_batch=batch * hvd.size(),
        crop=side,
        train=False,
        workers=None if options.workers < 0 else options.workers,
        max_bad_fraction=bad,
        pin=pin,
    )


def ten_crops(
    model: "torch.nn.Module", split: "Split", mean: "torch.Tensor", side: int, quiet: bool
) -> "torch.nn.Module":
    """`model` for uint8 images of `side` pixels, with the mean image of the whole of them where it is known."""
    from job.batches.device import load_mean
    from job.inference.scores import TenCrops, whole_mean

    whole = whole_mean(load_mean(split), mean)
    if whole is not None and whole.shape[0] > 1:
        top, left = ((length - side) // 2 for length in whole.shape[:2])
        whole = whole[top : top + side, left : left + side].contiguous()
    elif whole is None and not quiet:
        print(
            f"note: {split.root} does not have the mean image that the network was trained with; every crop gets that "
            "of the centre crop",
            file=sys.stderr,
        )
    return TenCrops(model, mean.permute(1, 2, 0).contiguous() if whole is None else whole, mean.shape[1])


def write_tables(
    options: argparse.Namespace, outcomes: "Outcomes", loader: "Loader", state: "RunState", settings: "Config"
) -> None:
    """Gather the rows of all ranks, and write --per-class and --per-sample on rank 0."""
    import horovod.torch as hvd

    from job.inference.outcomes import join, per_class_csv, per_sample_csv
    from shards.read.samples import Samples

    parts = hvd.allgather_object((outcomes.table(), loader.bad_samples), name="outcomes")
    if hvd.rank() > 0:
        return
    table = join([rows for rows, _ in parts])
    bad = {number: reason for _, found in parts for number, reason in found.items()}
    files = {}
    if options.per_class:
        files[options.per_class] = per_class_csv(table, state.classes, settings.model.classes)
    if options.per_sample:
        files[options.per_sample] = per_sample_csv(table, Samples(loader.split), state.classes, bad)
    for file, data in files.items():
        try:
            write_whole(file, data)
        except OSError as error:
            raise InputError(f"cannot write {file}: {os.strerror(error.errno or 0)}", everywhere=False) from None


def text(result: dict) -> str:
    """The result as one line."""
    crops = ", ten crops" if result["crops"] == 10 else ""
    return (
        f"{result['checkpoint']} on {result['split']}{crops}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
        f"loss {result['loss']:.4f}, {result['samples']:,} samples"
    )


def main() -> None:
    """The command."""
    options = parse()
    from job.ranks.process import run_ranks

    run_ranks(lambda: evaluate(options))


if __name__ == "__main__":
    run(main)
