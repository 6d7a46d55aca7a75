"""Samples of a split as arrays: any one by its number, or batches in the order of training.

In: a split. Out: `Sample`s and `SampleBatch`es, decoded in this process: for notebooks, and for tools that look at
single images. Training reads through job.batches, which is faster and gives the same samples in the same order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from shards.errors import InputError
from shards.format.split import BARE, Split, load_labels, read_idx
from shards.format.tar import split_name
from shards.read.images import BadImage, as_rgb, cover, decode
from shards.read.order import Order, batch_positions
from shards.read.planes import bare_bytes, to_rgb
from shards.read.reader import DamagedSample, ShardReader

_KEYS_OF_SHARDS = 8  # shards whose keys are kept in memory


@dataclasses.dataclass(frozen=True)
class Sample:
    """One image with its label."""

    image: np.ndarray  # uint8 (H, W, 3), RGB, as stored
    label: int
    name: str  # of the class; the label as text where the shards name no classes
    key: str  # name of the sample in its tar; empty where the index has no names


@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """The samples of one step of training."""

    images: np.ndarray | list[np.ndarray]  # uint8 (N, H, W, 3) as stored, or a list of (H, W, 3) where sizes differ
    labels: np.ndarray  # int64 (N,)
    samples: np.ndarray  # int64 (N,), numbers in the split
    epoch: int  # of the first sample


class Samples(Sequence):
    """The samples of a split as a sequence: `len`, numbers, slices, and iteration in the order of the shards.

    Works as a map-style data set of torch's DataLoader. Not for use by several threads.

    Attributes:
        split: what the index says of it.
        classes: names of the classes; a label is an index into them.
        labels: int32 (len,), of all samples.
    """

    def __init__(self, split: Split):
        self.split = split
        self.classes = split.classes
        self.labels = load_labels(split)
        self._ends = np.cumsum([shard.nsamples for shard in split.shards])
        self._reader = ShardReader(split)
        self._keys = functools.lru_cache(_KEYS_OF_SHARDS)(functools.partial(shard_keys, split))

    def __len__(self) -> int:
        return self.split.nsamples

    def __getitem__(self, number):
        """The sample of that number, or a list of samples for a slice.

        Raises:
            BadImage: it cannot be decoded. The message names shard and sample.
            InputError: its shard cannot be read.
        """
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]  # negative numbers, IndexError
        label = int(self.labels[number])
        return Sample(self.image(number), label, self.name(label), self.key(number))

    def place(self, number: int) -> tuple[int, int]:
        """Shard of a sample, and its number in that shard."""
        shard = int(np.searchsorted(self._ends, number, "right"))
        return shard, int(number) - int(self._ends[shard]) + self.split.shards[shard].nsamples

    def name(self, label: int) -> str:
        """Name of the class of a label."""
        return self.classes[label] if self.classes else str(label)

    def key(self, number: int) -> str:
        """Name of a sample in its tar."""
        shard, inside = self.place(number)
        return self._keys(shard)[inside]

    def image(self, number: int) -> np.ndarray:
        """Pixels of a sample, uint8 (H, W, 3). Raises as indexing does."""
        try:
            return pixels(self.split, self.data(number))
        except (DamagedSample, BadImage) as error:
            shard, inside = self.place(number)
            where = f"sample {inside} of {self.split.path(self.split.shards[shard].url)}"
            raise BadImage(f"{where}: {error}") from None

    def data(self, number: int) -> bytes:
        """The image member of a sample as it is in the tar. Raises DamagedSample or InputError, as ShardReader.read."""
        return bytes(self._reader.read(*self.place(number)))

    def close(self) -> None:
        """Close the shards; a later access opens them again."""
        self._reader.close()

    def __enter__(self) -> "Samples":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def __reduce__(self):  # worker processes of a DataLoader open the shards themselves
        return Samples, (self.split,)

    def __repr__(self) -> str:
        return f"<{len(self):,} samples of {self.split.name!r} in {self.split.root}, {len(self.classes)} classes>"


def pixels(split: Split, data: bytes) -> np.ndarray:
    """The image member of a sample as uint8 (H, W, 3). Raises BadImage."""
    if split.encoding not in BARE:
        return as_rgb(decode(data))
    size = bare_bytes(split.encoding, split.height, split.width)
    if len(data) != size:
        raise BadImage(f"{len(data)} bytes, not {size}")
    if split.encoding == "planes":
        return to_rgb(data, split.height, split.width)
    return np.frombuffer(data, np.uint8).reshape(split.height, split.width, 3)


def shard_keys(split: Split, shard: int) -> list[str]:
    """Names of the samples of a shard; empty where the index has none. Raises InputError as read_idx does."""
    return [split_name(members[0].name)[0] for members in read_idx(split, split.shards[shard])]


def batches(
    samples: Samples, batch: int, seed: int, epochs: int, start_step: int, window: int, streams: int
) -> Iterator[SampleBatch]:
    """Batches in the order of training, as `shards.stream` describes them."""
    split = samples.split
    order = Order([shard.nsamples for shard in split.shards], seed, window, streams)
    for step in range(start_step, -(-epochs * len(samples) // batch)):
        positions = batch_positions(step, 0, 1, batch)
        epoch, wanted = order.samples(positions[positions < epochs * len(samples)])
        numbers, images = zip(*(_usable(samples, number) for number in wanted.tolist()), strict=True)
        if split.height and split.width:
            images = np.stack([cover(image, split.height, split.width) for image in images])
        else:
            images = list(images)
        yield SampleBatch(images, samples.labels[list(numbers)].astype(np.int64), np.array(numbers), int(epoch[0]))


def _usable(samples: Samples, number: int) -> tuple[int, np.ndarray]:
    """Number and image of the sample, or, as in training, of the next one of its shard (after the last comes the first)
    that can be decoded."""
    shard, inside = samples.place(number)
    count = samples.split.shards[shard].nsamples
    for step in range(count):
        other = number - inside + (inside + step) % count
        try:
            return other, samples.image(other)
        except BadImage:
            continue
    path = samples.split.path(samples.split.shards[shard].url)
    raise InputError(f"not one image of {path} can be decoded; pack that shard again")
