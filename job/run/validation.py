"""Validation of a network: top-1, top-5 and loss over every sample of a split exactly once, on any number of ranks.

In: a network with its own mean image and classes, and each rank's loader. Out: figures that are the same on all ranks.
"""

from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from torch import Tensor

from job.batches.device import to_device
from job.batches.loader import Batch, Loader, too_many_bad
from job.inference.scores import centre_input, scores_of
from shards.errors import InputError
from shards.machine.progress import Progress


def validate(
    model: torch.nn.Module,
    loader: Loader,
    mean: Tensor | None,
    device: torch.device,
    precision: str,
    give_up: Callable[[], bool] = lambda: False,
    relabel: Tensor | None = None,
    observe: Callable[[Batch, Tensor, Tensor], Any] = lambda batch, scores, labels: None,
) -> dict[str, float] | None:
    """Accuracy of `model` on all samples of the ranks' loaders together.

    Every rank calls it with its own part. One sum over the ranks gives all of them the same figures.

    Args:
        mean: float32 (3, S, S), of the centre crop: that of training. None: the model takes the loader's uint8 images.
        give_up: asked before each batch whether to end without a result.
        relabel: int64, the network's label for each label of the split; None: they are the same.
        observe: is given each batch, its scores (float32) and the network's labels.

    Returns: top1 and top5 (fractions), loss (mean cross-entropy in nats), samples. None, on all ranks, when `give_up`
        became true on one of them before its last batch.

    Raises:
        InputError: on all ranks, when more samples are invalid than the loader allows.
    """
    # Right in 1, right in 5, loss, samples, bad ones, ranks that gave up.
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    shown = Progress(loader.split.nsamples, what="validation")  # rank 0 counts for all: they have equal shares
    to_input = centre_input(mean, device)
    was_training = model.training
    model.eval()
    try:
        for batch, images, labels in to_device(loader, device, to_input):
            labels = labels if relabel is None else relabel[labels]
            if give_up():
                sums[5] = 1
                break
            scores = scores_of(model, images, precision)  # (n, classes)
            five = scores.topk(min(5, scores.shape[1]), dim=1).indices  # (n, 5)
            hits = five == labels[:, None]
            sums[0] += hits[:, 0].sum()
            sums[1] += hits.sum()
            sums[2] += F.cross_entropy(scores, labels, reduction="none").double().sum()
            sums[3] += len(labels)
            sums[4] += batch.bad
            observe(batch, scores, labels)
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
