"""Which sample comes when: the order of the training data depends on seed, epoch and position only.

In: the number of samples of each shard, a seed, positions in the whole run. Out: the sample at each position, and the
random crop and mirror of a sample. Any position is found directly, without going through those before it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Shards are permuted in blocks. At least so many blocks make a shuffle window, so that it mixes samples from several
# places of the data set even where a shard holds only one class. A block of 256 JPEG files is still a 6 MB read.
_BLOCKS_PER_WINDOW = 4
# And at least so many make a stream, so that a small data set is mixed over all of its streams.
_BLOCKS_PER_STREAM = 8

_KEEP_EPOCHS = 3  # tables in memory: more than a batch at the end of an epoch needs
_KEEP_WINDOWS = 6

# Second word of Philox's counter, so that two uses never draw the same numbers.
_BLOCKS, _WINDOWS = 1, 2

_U64 = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The blocks of an epoch in their order. Arrays of shape (blocks,), in samples."""

    begin: np.ndarray  # place of a block's first sample in the epoch's sequence
    shift: np.ndarray  # what to add to a place in the sequence to get the sample number


class Order:
    """The samples of a split in the order of each epoch.

    The sequence of an epoch is all blocks of all shards, permuted. It is cut into `streams` equal parts, and each part
    is shuffled within windows of `window` samples. Position p of the epoch belongs to stream p % streams and is number
    p // streams in it. So each stream reads from few places at a time, and nothing depends on the number of ranks.
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int = 1024, streams: int = 64):
        if window < 1 or streams < 1:
            raise ValueError(f"window {window} and streams {streams} must be 1 or more")
        sizes = np.asarray(shard_sizes, np.int64)
        self.nsamples = int(sizes.sum())
        if self.nsamples < 1:
            raise ValueError("no samples")
        self.window = window
        self.streams = streams
        self._seed = int(seed) & _U64
        block = max(1, min(window // _BLOCKS_PER_WINDOW, self.nsamples // (_BLOCKS_PER_STREAM * streams)))
        ends = np.cumsum(sizes)
        cuts = [np.arange(end - size, end, block) for size, end in zip(sizes, ends, strict=True)]
        self._block_first = np.concatenate(cuts)  # sample number of each block's first sample
        self._block_size = np.diff(np.append(self._block_first, self.nsamples))
        short, longer = divmod(self.nsamples, streams)
        self._lengths = short + (np.arange(streams) < longer)  # samples of each stream
        self._starts = np.cumsum(self._lengths) - self._lengths  # place of each stream in the epoch's sequence
        self._epochs: dict[int, _Epoch] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def epoch_samples(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Sample numbers at `positions` (0 <= p < nsamples) of one epoch; int64, same shape."""
        stream, number = positions % self.streams, positions // self.streams
        window, place = number // self.window, number % self.window
        inside = np.empty_like(place)
        for w in np.unique(window):  # one, or two where a batch crosses a border, since all streams advance together
            chosen = window == w
            inside[chosen] = self._shuffle(epoch, int(w))[stream[chosen], place[chosen]]
        return self._sequence(epoch, self._starts[stream] + window * self.window + inside)

    def samples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample numbers at positions of the whole run (0, 1, 2, ...); int64, same shape."""
        epochs = positions // self.nsamples
        found = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self.epoch_samples(int(epoch), positions[chosen] % self.nsamples)
        return epochs, found

    def _sequence(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Sample numbers at places of the epoch's sequence before the shuffle within windows."""
        table = self._epochs.get(epoch)
        if table is None:
            order = _permutation(_philox(self._seed, _BLOCKS, epoch, 0), 1, len(self._block_first))[0]
            sizes = self._block_size[order]
            begin = np.cumsum(sizes) - sizes
            table = _keep(self._epochs, epoch, _Epoch(begin, self._block_first[order] - begin), _KEEP_EPOCHS)
        return places + table.shift[np.searchsorted(table.begin, places, "right") - 1]

    def _shuffle(self, epoch: int, window: int) -> np.ndarray:
        """Permutation of each stream within its window number `window`: (streams, longest)."""
        table = self._windows.get((epoch, window))
        if table is None:
            # Streams differ by one in length, so at most the last column of the table is past a stream's end.
            left = np.minimum(self._lengths - window * self.window, self.window)
            table = _permutation(_philox(self._seed, _WINDOWS, epoch, window), self.streams, int(left.max()), left)
            _keep(self._windows, (epoch, window), table, _KEEP_WINDOWS)
        return table


def _keep(cache: dict, key, value, limit: int):
    while len(cache) >= limit:
        del cache[next(iter(cache))]  # the oldest
    cache[key] = value
    return value


def _philox(seed: int, use: int, epoch: int, window: int) -> np.random.Philox:
    """Counter-based random numbers: those of an epoch and window can be drawn without any before them.

    Use its raw words only: numpy promises that they stay the same in every version, and not so for permutation().
    """
    return np.random.Philox(counter=[0, use, epoch, window], key=[seed, 0])


def _permutation(random: np.random.Philox, rows: int, n: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """`rows` permutations of 0..n-1, or in row r of 0..lengths[r]-1 followed by the rest. (rows, n) int64."""
    keys = random.random_raw(rows * n).reshape(rows, n)
    if lengths is not None:
        keys[np.arange(n) >= lengths[:, None]] = _U64  # last, and the stable sort keeps them after an equal key
    return np.argsort(keys, axis=1, kind="stable")


def batch_positions(step: int, rank: int, world_size: int, global_batch: int) -> np.ndarray:
    """Positions in the whole run of the samples that a rank takes in a step; int64 (global_batch / world_size,)."""
    first = step * global_batch
    return np.arange(first + rank, first + global_batch, world_size, dtype=np.int64)


def draws(seed: int, epochs: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """A random 64-bit word for each (epoch, sample): uint64, same shape.

    Source of the mixing function: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    seed_word = _mix(np.array([int(seed) & _U64], np.uint64))
    return _mix(_mix(seed_word + epochs.astype(np.uint64)) + samples.astype(np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mirrored(words: np.ndarray) -> np.ndarray:
    """Whether to mirror the sample with this random word: bool, same shape."""
    return (words >> np.uint64(63)).astype(bool)


def crop_corner(word, height, width, crop: int):
    """Top and left corner of the random crop: 0 <= top <= height - crop, all equally likely (to 1 in 2**16).

    Arguments are numbers or arrays: 24 bits of the word for each corner, scaled.
    """
    bits = np.uint64(0xFFFFFF)
    shift = np.uint64(24)
    top = ((word & bits) * np.asarray(height - crop + 1, np.uint64)) >> shift
    left = (((word >> shift) & bits) * np.asarray(width - crop + 1, np.uint64)) >> shift
    return top, left
