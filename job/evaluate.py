"""Validation of a network: top-1, top-5 and loss over every sample of a split exactly once, on any number of ranks.

In: a run directory or a checkpoint, and shards. Out: a line of text, or JSON with --json.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from shards.command import Parser, run
from shards.errors import InputError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m job.evaluate", description="Accuracy of a trained network on a split of shards.")
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run directory (its newest checkpoint) or file")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of shards")
    parser.add_argument("--split", default="val", help="split to evaluate [val]")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="images a step and rank [as in training]")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="reader processes a rank; -1: by cores")
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


def validate(
    model, loader, mean, device, precision: str, give_up: Callable[[], bool] = lambda: False, relabel=None
) -> dict[str, float] | None:
    """Accuracy of `model` on all samples that the ranks' loaders hold together.

    Every rank calls it with its own part; one sum over ranks at the end makes the figures the same everywhere.

    Args:
        mean: float32 (3, S, S), subtracted from the centre crop: the mean image that the network was trained with.
        relabel: int64, the network's label for each label of the split; None: they are the same.

    Returns: top1 and top5 (fractions), loss (mean cross-entropy, nats), samples. None, on all ranks, when `give_up`
    became true on one before its last batch.
    Raises InputError, on all ranks, when more samples are invalid than the loader allows.
    """
    import horovod.torch as hvd
    import torch
    import torch.nn.functional as F

    from job.batches.device import prepare, to_device
    from job.batches.loader import too_many_bad
    from shards.machine.progress import Progress

    # Right in 1, right in 5, loss, samples, bad ones, ranks that gave up.
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    shown = Progress(loader.split.nsamples, what="validation")  # rank 0 counts for all: they have equal shares
    mean = mean.permute(1, 2, 0).contiguous().to(device)  # (S, S, 3)
    # The crop's place in the stored image does not matter: the mean is that of the crop.
    to_input = lambda images, offsets, mirror: prepare(images, torch.zeros_like(offsets), mirror, mean)  # noqa: E731
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for batch, images, labels in to_device(loader, device, to_input):
                labels = labels if relabel is None else relabel[labels]
                if give_up():
                    sums[5] = 1
                    break
                scores = model(images).float()  # (n, classes)
                five = scores.topk(min(5, scores.shape[1]), dim=1).indices  # (n, 5)
                hits = five == labels[:, None]
                sums[0] += hits[:, 0].sum()
                sums[1] += hits.sum()
                sums[2] += F.cross_entropy(scores, labels, reduction="none").double().sum()
                sums[3] += len(labels)
                sums[4] += batch.bad
                if hvd.rank() == 0:
                    shown.add(min(len(labels) * hvd.size(), shown.total - shown.done))
    finally:
        shown.close()
        model.train(was_training)
    sums = hvd.allreduce(sums.cpu(), name="validation", op=hvd.Sum)
    if sums[5]:
        return None
    bad = int(sums[4])
    if bad > loader.max_bad_fraction * loader.split.nsamples:
        raise InputError(too_many_bad(bad, loader.split, loader.max_bad_fraction))
    top1, top5, loss = (sums[:3] / sums[3]).tolist()
    return {"top1": top1, "top5": top5, "loss": loss, "samples": int(sums[3])}


def match_classes(split, known: Sequence[str], classes: int, path: str):
    """The network's label for each label of `split`, int64, or None where they are the same.

    Args:
        known: names of the network's classes; empty: not known.
        classes: outputs of the network.

    Raises:
        InputError: a class of the split is none of the network's.
    """
    import torch

    from shards.format.split import load_labels

    names, known = list(split.classes), list(known)
    where = f"{split.name} of {split.root}"
    if names and known and names != known:
        unknown = next((name for name in names if known.count(name) != 1), None)
        if unknown is not None:
            raise InputError(
                f"{where} has the class {unknown!r}, which is not one of the {len(known)} of {path}; give shards with "
                "the names of classes that it was trained on, or correct `classes` in the index"
            )
        return torch.tensor([known.index(name) for name in names])
    largest = len(names) or int(load_labels(split).max()) + 1
    if largest > classes:
        raise InputError(f"{where} has {largest} classes, the network of {path} has {classes}")
    return None


def match_size(split, crop: int, trained: Sequence[int] = (0, 0)) -> str:
    """A warning where the images of `split` are stored at another size than `trained` (height, width; 0: not known).

    Raises:
        InputError: they are smaller than the crops of `crop` pixels.
    """
    height, width = split.height, split.width
    if not (height and width):
        return ""
    stored = f"the {split.name} images of {split.root} are {width}x{height}"
    if min(height, width) < crop:
        raise InputError(f"{stored}, too small for crops of {crop}x{crop} (--image-size); pack larger ones")
    if all(trained) and (height, width) != tuple(trained):
        return (
            f"{stored}, and those that the network learns from {trained[1]}x{trained[0]}: a centre crop shows another "
            "part of them, and accuracy suffers; pack both with the same --resize"
        )
    return ""


def evaluate(options: argparse.Namespace) -> None:
    import horovod.torch as hvd

    from job import config
    from job.batches.loader import Loader
    from job.ranks.agree import agree, split_facts
    from job.run import checkpoint
    from job.run.step import set_precision
    from shards.format.split import load_split

    def open_data():
        """What is evaluated, and by which network; what all ranks must see alike."""
        split = load_split(options.data, options.split)
        path = checkpoint.find(options.checkpoint)
        state = checkpoint.load(path)
        settings = config.from_flat(state["config"], path)
        relabel = match_classes(split, state["classes"], settings.model.classes, path)
        problem = match_size(split, settings.image_size, state.get("image", (0, 0)))
        facts = {**split_facts(split, mean=False), "checkpoint": f"step {state['step']}"}
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
        result = validate(model, loader, state["mean"], device, settings.precision, relabel=relabel)
    if hvd.rank() == 0:
        result = {"checkpoint": path, "split": options.split, "step": state["step"], **result}
        if options.json:
            print(json.dumps(result), flush=True)
        else:
            print(
                f"{path} on {options.split}: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
                f"loss {result['loss']:.4f}, {result['samples']:,} samples",
                flush=True,
            )


def main() -> None:
    options = parse()
    from job.ranks.process import run_ranks

    run_ranks(lambda: evaluate(options))


if __name__ == "__main__":
    run(main)
