"""Training images as the network gets them: through the loader and the preparation of training.

In: a split and the settings of a run. Out: uint8 images, with the mean image added back for display.
"""

from dataclasses import dataclass

import numpy as np
import torch

from job.batches.device import load_mean, prepare
from job.batches.loader import Loader
from job.batches.planes import crops_as_rgb
from job.config import Config
from shards.format.split import Split


@dataclass(frozen=True)
class Crop:
    """One image of a training batch."""

    image: np.ndarray  # uint8 (S, S, 3)
    label: int
    top: int  # of the crop in the stored image, in pixels
    left: int
    mirrored: bool

    @property
    def place(self) -> str:
        """Where the crop was taken, and whether it was mirrored."""
        return f"at {self.top}, {self.left}{', mirrored' if self.mirrored else ''}"


def first_crops(split: Split, config: Config, most: int) -> list[Crop]:
    """The first `most` images of the first global batch of a run, in their order over all ranks.

    Raises:
        InputError: a shard cannot be read, or the images are smaller than the crop.
    """
    # The positions of step 0 are 0 to global_batch - 1, and an image's crop depends on seed, epoch and image only: a
    # smaller batch holds the first ones of the larger one.
    with Loader(
        split,
        rank=0,
        world_size=1,
        global_batch=min(most, config.global_batch),
        crop=config.image_size,
        seed=config.seed,
        workers=0,
        mirror=config.stream.mirror,
        random_crop=config.stream.random_crop,
        window=config.stream.window,
        streams=config.stream.streams,
        max_bad_fraction=1.0,
    ) as loader:
        batch = next(loader)
        mean = load_mean(split)
        crops = crops_as_rgb(batch.images, batch.offsets)
        prepared = prepare(crops, batch.offsets, batch.mirror, mean)  # (N, 3, S, S)
        subtracted = prepare(torch.zeros_like(crops), batch.offsets, batch.mirror, mean)
        images = (prepared - subtracted).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        rows = zip(images, batch.labels.tolist(), batch.offsets.tolist(), batch.mirror.tolist(), strict=True)
        return [Crop(np.ascontiguousarray(image), label, *at, mirrored) for image, label, at, mirrored in rows]
