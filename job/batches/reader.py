"""A reader process of a rank: reads, decodes and crops images into the batch slots of a shared memory.

In: tasks over a socket, (slot, first row, rows), with the samples' numbers in the slot. Out: pixels in the slot and a
message that they are there. job.batches.loader uses `Slots` and `Decoder` in the rank's own process, too. torch is not
imported here, so that a reader starts in a fraction of a second.
"""

import dataclasses
import json
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import traceback

import numpy as np

from shards.errors import InputError
from shards.format.split import BARE, Shard, Split
from shards.read import fastjpeg, planes
from shards.read.images import BadImage, as_rgb, cover, decode, fit_image, simplejpeg
from shards.read.order import crop_corner
from shards.read.reader import DamagedSample, ShardReader

# Short side to which images without a fixed size are scaled, relative to the crop: like 256 to AlexNet's 227.
_RESIZE = 256 / 227


def short_side(crop: int) -> int:
    """Pixels to which the shorter side of an image is scaled, where the images of a split differ in size."""
    return max(crop, round(crop * _RESIZE))


# Messages, both ways in one SOCK_SEQPACKET each: what, slot, first row, rows (BAD: sample number), and text.
_HEAD = struct.Struct("<4q")
DONE, BAD, WRONG_INPUT, FAILED = range(4)
_MESSAGE_BYTES = 1 << 15

# How often a reader without work checks that its rank still lives. The socket says so at once, unless some other
# process inherited the rank's end of it.
_IDLE_SECONDS = 1.0


def pack_message(what: int, slot: int, first: int, count: int, text: str = "") -> bytes:
    """Four numbers and a text as one message."""
    return _HEAD.pack(what, slot, first, count) + text.encode("utf-8", "replace")[: _MESSAGE_BYTES - _HEAD.size]


def unpack_message(message: bytes) -> tuple[int, int, int, int, str]:
    """The four numbers and the text of a message."""
    return *_HEAD.unpack_from(message), message[_HEAD.size :].decode("utf-8", "replace")


@dataclasses.dataclass(frozen=True)
class ReaderConfig:
    """What a reader process needs to know besides its tasks."""

    split: Split
    crop: int
    rows: int  # images per slot
    slots: int
    random_crop: bool
    cores: tuple[int, ...] = ()  # to run on; empty: any

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image in a slot, uint8: RGB (crop, crop, 3), or the bytes of its planes."""
        if self.split.encoding == "planes":
            return (planes.crop_bytes(self.crop),)
        return self.crop, self.crop, 3

    @property
    def slot_bytes(self) -> int:
        """Bytes of the images of a slot, in whole pages."""
        return _round_up(self.rows * math.prod(self.image_shape))

    def to_json(self) -> bytes:
        """As text for another process."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "ReaderConfig":
        """From the text of `to_json`."""
        fields = json.loads(data)
        split = fields.pop("split")
        split["classes"] = tuple(split["classes"])
        split["shards"] = tuple(Shard(**shard) for shard in split["shards"])
        fields["cores"] = tuple(fields["cores"])
        return cls(split=Split(**split), **fields)


class Slots:
    """Batch slots in a shared memory, as arrays whose first axis is the slot and whose second the row.

    The images come first, each slot on pages of its own, then the small columns.
    """

    # From the rank.
    samples: np.ndarray  # int64 number in the split
    words: np.ndarray  # uint64 random word of the sample
    offsets: np.ndarray  # int32 (.., 2) top and left of the crop; from the worker where images have no fixed size
    # From the worker.
    used: np.ndarray  # int64 number of the sample that came: another than `samples` if that was damaged; -1: none yet
    # From the rank for itself.
    labels: np.ndarray  # int64
    mirror: np.ndarray  # bool

    def __init__(self, memory: mmap.mmap, config: ReaderConfig):
        n, rows, stride, shape = config.slots, config.rows, config.slot_bytes, config.image_shape
        pixels = np.frombuffer(memory, np.uint8, n * stride).reshape(n, stride)
        self.images = pixels[:, : rows * math.prod(shape)].reshape(n, rows, *shape)
        at = n * stride
        for name, dtype, shape in _COLUMNS:
            count = n * rows * int(np.prod(shape))
            setattr(self, name, np.frombuffer(memory, dtype, count, at).reshape(n, rows, *shape))
            at += _round_up(count * np.dtype(dtype).itemsize)

    @staticmethod
    def nbytes(config: ReaderConfig) -> int:
        """Bytes that the slots of a reader's settings take."""
        rows = config.slots * config.rows
        columns = sum(_round_up(rows * int(np.prod(shape)) * np.dtype(dtype).itemsize) for _, dtype, shape in _COLUMNS)
        return config.slots * config.slot_bytes + columns


_COLUMNS = (
    ("samples", np.int64, ()),
    ("used", np.int64, ()),
    ("words", np.uint64, ()),
    ("offsets", np.int32, (2,)),
    ("labels", np.int64, ()),
    ("mirror", np.bool_, ()),
)


def _round_up(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


class Decoder:
    """Fills rows of slots.

    A sample that cannot be used is replaced by the next one of its shard that can (after the last comes the first), so
    the replacement is the same in any process and on any rank.
    """

    def __init__(self, config: ReaderConfig, slots: Slots):
        self._config = config
        self._slots = slots
        self._reader = ShardReader(config.split)
        self._ends = np.cumsum([shard.nsamples for shard in config.split.shards])
        split = config.split
        self._fixed = (split.height, split.width) if split.height and split.width else None
        self._planes = planes.nbytes(*self._fixed) if self._fixed and split.encoding == "planes" else 0  # bytes
        if self._planes:
            self._luma, self._chroma = planes.crop_views(slots.images, config.crop)
        self._scratch = np.empty((*(self._fixed if self._fixed and not self._planes else (0, 0)), 3), np.uint8)
        self._fast = fastjpeg.decoder() if self._fixed and split.encoding not in BARE else None
        self._address = slots.images.ctypes.data  # of the first slot's first row

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def fill(self, slot: int, first: int, count: int, alive=lambda: True) -> list[tuple[int, str]]:
        """Fill rows first .. first + count - 1 of a slot. Returns (sample number, reason) of those replaced.

        Raises:
            InputError: a shard that cannot be read.
        """
        rows = slice(first, first + count)
        samples = self._slots.samples[slot, rows]
        shards = np.searchsorted(self._ends, samples, "right")
        inside = samples - (self._ends[shards] - np.array([self._config.split.shards[s].nsamples for s in shards]))
        replaced = []
        for row, shard, number in zip(range(first, first + count), shards.tolist(), inside.tolist(), strict=True):
            if not alive():
                break
            try:
                self._place(slot, row, self._reader.read(shard, number))
                self._slots.used[slot, row] = samples[row - first]
            except (DamagedSample, BadImage) as error:
                begin = int(samples[row - first]) - number
                other = self._replace(slot, row, shard, number)
                replaced.append((begin + number, str(error)))
                self._slots.used[slot, row] = begin + other
        return replaced

    def name(self, sample: int) -> str:
        """How to call a sample in a message: its shard and its number there."""
        shard = int(np.searchsorted(self._ends, sample, "right"))
        inside = sample - int(self._ends[shard]) + self._config.split.shards[shard].nsamples
        return f"sample {inside} of {self._config.split.path(self._config.split.shards[shard].url)}"

    def name_at(self, slot: int, row: int) -> str:
        """How to call the sample that is wanted in a row."""
        return self.name(int(self._slots.samples[slot, row]))

    def _replace(self, slot: int, row: int, shard: int, number: int) -> int:
        count = self._config.split.shards[shard].nsamples
        for step in range(1, count):
            other = (number + step) % count
            try:
                self._place(slot, row, self._reader.read(shard, other))
                return other
            except (DamagedSample, BadImage):
                continue
        path = self._config.split.path(self._config.split.shards[shard].url)
        raise InputError(f"not one image of {path} can be decoded; pack that shard again", everywhere=False)

    def _place(self, slot: int, row: int, data: memoryview) -> None:
        """Decode an image's crop into a row, or copy it there: the only copy of a pixel on the CPU after decoding."""
        crop, images = self._config.crop, self._slots.images
        if self._fixed is not None:
            top, left = self._slots.offsets[slot, row].tolist()
            if self._planes:
                if len(data) != self._planes:
                    raise BadImage(f"{len(data)} bytes, not {self._planes}")
                planes.copy_crop(data, self._fixed, (top, left), self._luma[slot, row], self._chroma[slot, row])
                return
            address = self._address + slot * images.strides[0] + row * images.strides[1]
            if self._fast is None or not self._fast.crop(data, self._fixed, (top, left), (crop, crop), address):
                images[slot, row] = self._pixels(data)[top : top + crop, left : left + crop]
            return
        target = images[slot, row]
        size = short_side(crop)
        image = decode(data, size)
        image = as_rgb(fit_image(image, size, "none"))
        height, width = image.shape[:2]
        if self._config.random_crop:
            corner = crop_corner(self._slots.words[slot, row], height, width, crop)
        else:
            corner = (height - crop) // 2, (width - crop) // 2
        top, left = self._slots.offsets[slot, row] = corner
        target[:] = image[top : top + crop, left : left + crop]

    def _pixels(self, data: memoryview) -> np.ndarray:
        """(H, W, 3) uint8 of an image of a split whose images all have one size. Valid until the next call."""
        if self._config.split.encoding == "raw":
            if len(data) != self._scratch.size:
                raise BadImage(f"{len(data)} bytes, not {self._scratch.size}")
            return np.frombuffer(data, np.uint8).reshape(self._scratch.shape)
        if simplejpeg is not None:
            try:
                image = simplejpeg.decode_jpeg(data, "RGB", buffer=self._scratch)
                if image.shape == self._scratch.shape:
                    return image
            except ValueError:
                pass  # not a JPEG, larger than the others, or damaged: `decode` finds out which
        height, width = self._fixed
        image = decode(bytes(data), max(height, width))
        return as_rgb(cover(image, height, width))  # it may be of another size than the rest


def main() -> None:
    """Serve the socket and memory whose descriptors are the arguments, until the rank closes the socket."""
    # The rank decides when to stop: a Ctrl-C or a signal to the whole process group is for it alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    rank = os.getppid()
    channel = socket.socket(fileno=int(sys.argv[1]))
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    descriptor, total, about = (int(word) for word in sys.argv[2:5])
    memory = mmap.mmap(descriptor, total)
    config = ReaderConfig.from_json(memory[total - about :])
    if config.cores:
        os.sched_setaffinity(0, config.cores)
    decoder = Decoder(config, Slots(memory, config))

    def alive() -> bool:
        return os.getppid() == rank

    while alive():
        if not poll.poll(_IDLE_SECONDS * 1000):
            continue
        try:
            message = channel.recv(_MESSAGE_BYTES)
            if not message:
                break
            _, slot, first, count, _ = unpack_message(message)
            try:
                for sample, reason in decoder.fill(slot, first, count, alive):
                    channel.sendall(pack_message(BAD, slot, first, sample, reason))
                answer = pack_message(DONE, slot, first, count)
            except InputError as error:
                answer = pack_message(WRONG_INPUT, slot, first, count, str(error))
            except Exception:
                answer = pack_message(FAILED, slot, first, count, traceback.format_exc())
            channel.sendall(answer)
        except OSError:
            break  # the rank has gone
    os._exit(0)  # nothing to clean up: the memory is the rank's


if __name__ == "__main__":
    main()
