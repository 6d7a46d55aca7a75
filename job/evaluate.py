"""Accuracy of a checkpoint on a split of shards: `python -m job.evaluate RUN --data DIR`, on any number of ranks.

In: a run directory or a checkpoint, and shards. Out: a line of text, or JSON with --json.
"""

import argparse
import json
import sys

from shards.command import Parser, run
from shards.errors import InputError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(prog="python -m job.evaluate", description="Accuracy of a trained network on a split of shards.")
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run directory (its newest checkpoint) or file")
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.batch < 0 or options.workers < -1:
        raise InputError("--batch must be 0 or more and --workers -1 or more")
    if options.max_bad_fraction is not None and not 0 <= options.max_bad_fraction <= 1:
        raise InputError(f"--data.max-bad-fraction is {options.max_bad_fraction}; it must be from 0 to 1")
    return options


def evaluate(options: argparse.Namespace) -> None:
    """Measure on all ranks together; rank 0 prints. Raises InputError."""
    import horovod.torch as hvd

    from job import config
    from job.batches.data import match_size, split_facts
    from job.batches.loader import Loader
    from job.ranks.agree import agree
    from job.run import checkpoint
    from job.run.step import set_precision
    from job.run.validation import match_classes, validate
    from shards.format.split import load_split

    def open_data():
        """The split and the checkpoint; and what must be the same on all ranks."""
        split = load_split(options.data, options.split)
        path, state = checkpoint.load_named(options.checkpoint)
        facts = {**split_facts(split, mean=False), "checkpoint": f"step {state.step}"}
        settings = config.from_flat(state.config, path)
        relabel = match_classes(split, state.classes, settings.model.classes, path)
        problem = match_size(split, settings.image_size, state.image)
        return (split, path, state, settings, relabel, problem), facts

    agreed = agree(vars(options), open_data)
    device, (split, path, state, settings, relabel, problem) = agreed.device, agreed.found
    if problem and hvd.rank() == 0:
        print(f"warning: {problem}", file=sys.stderr, flush=True)
    set_precision(settings.precision)
    model = checkpoint.network(state, path).to(device)
    batch = options.batch or max(1, settings.global_batch // hvd.size())
    bad = settings.stream.max_bad_fraction if options.max_bad_fraction is None else options.max_bad_fraction
    with Loader(
        split,
        rank=hvd.rank(),
        world_size=hvd.size(),
        global_batch=batch * hvd.size(),
        crop=settings.image_size,
        train=False,
        workers=None if options.workers < 0 else options.workers,
        max_bad_fraction=bad,
        pin=device.type == "cuda",
    ) as loader:
        relabel = None if relabel is None else relabel.to(device)
        result = validate(model, loader, state.mean, device, settings.precision, relabel=relabel)
    if hvd.rank() == 0:
        result = {"checkpoint": path, "split": options.split, "step": state.step, **result}
        print(json.dumps(result) if options.json else text(result), flush=True)


def text(result: dict) -> str:
    """The result as one line."""
    return (
        f"{result['checkpoint']} on {result['split']}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
        f"loss {result['loss']:.4f}, {result['samples']:,} samples"
    )


def main() -> None:
    """The command."""
    options = parse()
    from job.ranks.process import run_ranks

    run_ranks(lambda: evaluate(options))


if __name__ == "__main__":
    run(main)
