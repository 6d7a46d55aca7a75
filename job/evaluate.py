"""Validation of a network: top-1, top-5 and loss over every sample of a split exactly once, on any number of ranks.

In: a run directory or a checkpoint, and shards. Out: a line of text, or JSON with --json.
"""

import argparse
import json
from collections.abc import Callable

from shards.cli import InputError, Parser, run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="python -m job.evaluate", description="Accuracy of a trained network on a split of shards.")
    parser.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT", help="run directory (its newest checkpoint) or file")
    parser.add_argument("--data", required=True, metavar="DIR", help="folder of shards")
    parser.add_argument("--split", default="val", help="split to evaluate [val]")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="images a step and rank [as in training]")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="reader processes a rank; -1: by cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if options.batch < 0 or options.workers < -1:
        raise InputError("--batch must be 0 or more and --workers -1 or more")
    return options


def validate(
    model, loader, mean, device, precision: str, give_up: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """Accuracy of `model` on all samples that the ranks' loaders hold together.

    Every rank calls it with its own part; one sum over ranks at the end makes the figures the same everywhere.
    Returns: top1 and top5 (fractions), loss (mean cross-entropy, nats), samples. None, on all ranks, when `give_up`
    became true on one before its last batch.
    Raises InputError, on all ranks, when more samples are of no use than the loader allows.
    """
    import horovod.torch as hvd
    import torch
    import torch.nn.functional as F

    from job.augment import prepare, to_device
    from job.loader import too_many_bad
    from shards.progress import Progress

    # Right in 1, right in 5, loss, samples, bad ones, ranks that gave up.
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    shown = Progress(loader.split.nsamples, what="validation")  # rank 0 counts for all: they have equal shares
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            for batch, images, labels in to_device(loader, device, lambda *parts: prepare(*parts, mean)):
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


def evaluate(options: argparse.Namespace) -> None:
    import horovod.torch as hvd

    from job import checkpoint, config
    from job.agree import agree, split_facts
    from job.augment import load_mean
    from job.loader import Loader
    from job.model import build
    from job.passes import set_precision
    from shards.split import load_split

    def open_data():
        """(split, file of the checkpoint, its content, its settings); what all ranks must see alike."""
        split = load_split(options.data, options.split)
        path = checkpoint.find(options.checkpoint)
        state = checkpoint.load(path)
        settings = config.from_flat(state["config"])
        classes = settings.model.classes
        if len(split.classes) > classes:
            raise InputError(f"{options.data} has {len(split.classes)} classes, the network of {path} has {classes}")
        return (split, path, state, settings), {**split_facts(split), "checkpoint": f"step {state['step']}"}

    agreed = agree(vars(options), open_data)
    device, (split, path, state, settings) = agreed.device, agreed.found
    set_precision(settings.precision)
    model = build(settings).to(device)
    model.load_state_dict(state["model"])
    batch = options.batch or max(1, settings.global_batch // hvd.size())
    with Loader(
        split,
        rank=hvd.rank(),
        world_size=hvd.size(),
        global_batch=batch * hvd.size(),
        crop=settings.image_size,
        train=False,
        workers=None if options.workers < 0 else options.workers,
        pin=device.type == "cuda",
    ) as loader:
        result = validate(model, loader, load_mean(split, device), device, settings.precision)
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
    from job.ranks import run_ranks

    run_ranks(lambda: evaluate(options))


if __name__ == "__main__":
    run(main)
