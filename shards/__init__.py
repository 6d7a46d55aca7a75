"""WebDataset tar shards: pack, index, verify and read them. Knows tar files and images, and nothing of training.

For notebooks: `open_split` and `stream`. Importing this package takes no time: numpy comes with the first call.
"""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.read.samples import SampleBatch, Samples

__all__ = ["ROOT", "open_split", "stream"]

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder that holds both packages


def open_split(data: str | os.PathLike, split: str = "train") -> "Samples":
    """The samples of a split, by number.

    >>> val = open_split("runs/demo-data", "val")  # doctest: +SKIP
    >>> len(val), val.classes, val.labels  # doctest: +SKIP
    >>> val[0].image, val[0].label, val[0].name, val[0].key  # doctest: +SKIP

    Args:
        data: folder or URL of shards that shards.pack or shards.index made.

    Raises:
        InputError: no such folder or split, or its index is damaged.
    """
    from shards.format.split import load_split
    from shards.read.samples import Samples

    return Samples(load_split(os.fspath(data), split))


def stream(
    data: str | os.PathLike,
    split: str = "train",
    batch: int = 256,
    *,
    seed: int = 1,
    epochs: int = 1,
    start_step: int = 0,
    window: int = 1024,
    streams: int = 64,
) -> "Iterator[SampleBatch]":
    """Batches in the order of training: those of job.train with the same global batch, seed, window and streams.

    Whole images as stored, without crop, mirror and mean. A damaged image is replaced as in training. Epochs follow one
    another without a gap; the last batch may be short.

    Args:
        data: folder or URL of shards that shards.pack or shards.index made.
        batch: images per batch (`--global-batch`).
        start_step: steps to leave out at the beginning; nothing of them is read.
        window: `--data.window`.
        streams: `--data.streams`.

    Raises:
        InputError: no such folder or split, a shard that cannot be read, or a number below 1.
    """
    from shards.errors import InputError
    from shards.read.samples import batches

    if min(batch, epochs, window, streams) < 1 or start_step < 0:
        raise InputError("batch, epochs, window and streams must be 1 or more, and start_step 0 or more")
    return batches(open_split(data, split), batch, seed, epochs, start_step, window, streams)
