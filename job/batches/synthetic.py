"""Noise as training data, to measure everything except reading: `--data synthetic`.

In: image size and batch of this rank. Out: a split without files, as long as ImageNet, and a loader that returns the
same batch in every step, from memory that is pinned on CUDA.
"""

import dataclasses

import torch

from job.batches.loader import Batch
from shards.format.split import Shard, Split

NAME = "synthetic"
IMAGES = 1_281_167  # training images of ILSVRC 2012: sets the length of an epoch
CLASSES = 1000


def synthetic_split(classes: int) -> Split:
    """A split without files, of `classes` classes (0: as many as ImageNet has)."""
    return Split("train", NAME, (Shard(NAME, IMAGES),), tuple(map(str, range(classes or CLASSES))))


class SyntheticLoader:
    """Endless batches of this rank, like those of `job.batches.loader.Loader`, without spending time on them."""

    def __init__(
        self,
        split: Split,
        *,
        rank: int,
        world_size: int,
        global_batch: int,
        crop: int,
        start_step: int,
        pin: bool,
    ):
        n = global_batch // world_size
        random = torch.Generator().manual_seed(rank)
        parts = dict(
            images=torch.randint(0, 256, (n, crop, crop, 3), dtype=torch.uint8, generator=random),
            labels=torch.randint(0, len(split.classes), (n,), generator=random),
            offsets=torch.zeros(n, 2, dtype=torch.int32),
            mirror=torch.zeros(n, dtype=torch.bool),
        )
        if pin:
            parts = {name: part.pin_memory() for name, part in parts.items()}
        self.rows_read = 0  # as of job.batches.loader.Loader; here the steps alone show that a rank is alive
        self._per_epoch, self._global_batch = split.nsamples, global_batch
        self._batch = Batch(**parts, step=start_step - 1, epoch=0, wait_seconds=0.0, bad=0)

    def __iter__(self) -> "SyntheticLoader":
        return self

    def __next__(self) -> Batch:
        step = self._batch.step + 1
        self._batch = dataclasses.replace(self._batch, step=step, epoch=step * self._global_batch // self._per_epoch)
        return self._batch

    def close(self) -> None:
        """Nothing to close."""
