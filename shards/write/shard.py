"""Writes one shard: reads its images ahead, decodes, fits and encodes them, writes tar and index, sums up the mean.

In: a `Packing` and the number of the shard. Out: DEST/<split>-000000.tar and .idx, renamed to these names when whole,
and a `ShardRecord` in DEST/.pack. The bytes depend on the `Packing` only: any process on any machine writes the same.
"""

import collections
import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from shards.errors import InputError
from shards.format.names import STATE
from shards.format.split import BARE, Member, format_idx, idx_path, npy_bytes
from shards.format.tar import BLOCK
from shards.machine.files import sync_folder, write_whole
from shards.read import images, planes
from shards.read.images import BadImage
from shards.sources.items import Items, SourceReader, load_table

KEY_DIGITS = 8
_READ_THREADS = 4  # enough to hide the latency of a network file system
_READ_CHUNK = 4  # images that a thread reads at a time
_CHUNKS_AHEAD = 4
# Reading is left to threads for the rest of the shard after this many chunks in a row that took more than this many
# seconds per image. From the page cache an image takes 20 us; getting it from a thread takes 65 us.
_SLOW_READ, _SLOW_CHUNKS = 2e-4, 2
MEAN_PIXELS = 1 << 22  # larger images get no mean image: it would be larger than the rest of the process
SIZES_DIFFER = "images must all have one size, and these differ; give --resize with --fit crop or squash"


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything besides the source that decides the bytes of the shards."""

    resize: int = 256  # pixels; 0: sizes are kept
    fit: str = "crop"  # crop, squash, none
    encoding: str = "jpeg"  # jpeg, raw, planes, copy
    quality: int = 90
    seed: int = 0  # of the shuffle
    shard_mb: float | None = None  # wanted size of a shard; None: the default
    shard_images: int | None = None  # the same as a number of images


class ShardId(NamedTuple):
    """A shard among all that one command packs."""

    packing: int  # position of its split in the list of packings
    shard: int  # number in the split


@dataclasses.dataclass
class ShardRecord:
    """What finishing the split needs to know of a packed shard; as JSON in DEST/.pack."""

    shard: int
    nsamples: int
    filesize: int  # bytes
    sha256: str  # hex digest of the tar
    size: tuple[int, int]  # height and width of all its images; (0, 0): they differ
    summed: bool  # the sums of its pixels are saved
    bad: list[tuple[str, str]]  # name and reason of each image left out


@dataclasses.dataclass(frozen=True)
class Packing:
    """One split to be packed. `items` may come without its arrays: they are then mapped from DEST/.pack."""

    dest: str
    items: Items
    options: Options
    nshards: int

    @property
    def nsamples(self) -> int:
        """Images of the split."""
        return len(self.items.table)

    def bounds(self, shard: int) -> tuple[int, int]:
        """First and last + 1 of the images of a shard."""
        return bounds(self.nsamples, self.nshards, shard)

    def tar(self, shard: int) -> str:
        """Final path of a shard."""
        return os.path.join(self.dest, f"{self.items.split}-{shard:06d}.tar")

    def state(self, name: str) -> str:
        """Path in DEST/.pack."""
        return os.path.join(self.dest, STATE, name)

    def record(self, shard: int) -> str:
        """Path of a finished shard's record."""
        return self.state(f"{self.items.split}-{shard:06d}.json")

    def columns(self, shard: int) -> str:
        """Path of the labels and CRC-32s of a finished shard's samples, uint32 (2, nsamples)."""
        return self.state(f"{self.items.split}-{shard:06d}.columns.npy")

    def sums(self, shard: int) -> str:
        """Path of a finished shard's sums of pixels."""
        return self.state(f"{self.items.split}-{shard:06d}.sums.npy")


def bounds(nsamples: int, nshards: int, shard: int) -> tuple[int, int]:
    """First and last + 1 of the images of a shard; shards differ by one image at most."""
    size, longer = divmod(nsamples, nshards)
    first = shard * size + min(shard, longer)
    return first, first + size + (shard < longer)


class Packer:
    """Packs shards of some splits, one at a time, in this process."""

    def __init__(self, packings: list[Packing]):
        import torch

        torch.set_num_threads(1)  # there is a process per core already
        self.packings = [p if p.nsamples else _with_table(p) for p in packings]
        self._readers = [SourceReader(packing.items) for packing in self.packings]
        self._pool = concurrent.futures.ThreadPoolExecutor(_READ_THREADS, "read")

    def close(self) -> None:
        """Stop reading ahead and close the source's archives."""
        self._pool.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def pack(self, number: int, shard: int, tick: Callable[[int], None]) -> ShardRecord:
        """Write a shard of packing `number`, and its record. `tick(1)` is called after each image, and may raise.

        Raises:
            InputError: the source cannot be read or DEST cannot be written. Nothing of the shard is left then.
        """
        packing = self.packings[number]
        tar = packing.tar(shard)
        temporary = packing.state(f"{os.path.basename(tar)}.{os.uname().nodename}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb", buffering=1 << 20) as file:
                written = _ShardWriter(packing, _HashedFile(file))
                try:
                    for row, data in self._read_ahead(number, *packing.bounds(shard)):
                        written.add(row, data)
                        tick(1)
                finally:
                    written.close()
                file.flush()
                os.fsync(file.fileno())
            write_whole(idx_path(tar), format_idx(written.members))
            write_whole(packing.columns(shard), npy_bytes(np.array([written.labels, written.crc32], np.uint32)))
            if written.sums is not None:
                write_whole(packing.sums(shard), npy_bytes(written.sums))
            os.replace(temporary, tar)
            sync_folder(packing.dest)
            record = written.record(shard)
            write_whole(packing.record(shard), (json.dumps(dataclasses.asdict(record)) + "\n").encode())
            return record
        except OSError as error:
            raise write_error(packing.dest, error) from None
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def _read_ahead(self, number: int, first: int, last: int) -> Iterator[tuple[int, bytes | BadImage]]:
        """Row and bytes of the images first .. last-1, in order. Where reading is slow, threads read them ahead."""
        reader = self._readers[number]

        def read(start: int) -> list[bytes | BadImage]:
            chunk: list[bytes | BadImage] = []
            for row in range(start, min(start + _READ_CHUNK, last)):
                try:
                    chunk.append(reader.read(row))
                except BadImage as error:
                    chunk.append(error)
            return chunk

        starts, slow = iter(range(first, last, _READ_CHUNK)), 0
        pending = collections.deque()
        for start in range(first, last, _READ_CHUNK):
            if slow < _SLOW_CHUNKS:
                began = time.perf_counter()
                chunk = read(next(starts))
                slow = slow + 1 if time.perf_counter() - began > _SLOW_READ * len(chunk) else 0
            else:
                while len(pending) < _CHUNKS_AHEAD and (ahead := next(starts, None)) is not None:
                    pending.append(self._pool.submit(read, ahead))
                chunk = pending.popleft().result()
            for i, data in enumerate(chunk):
                yield start + i, data


def _with_table(packing: Packing) -> Packing:
    return dataclasses.replace(packing, items=load_table(packing.items, packing.state("")))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The image member of a sample."""

    ending: str
    payload: bytes
    size: tuple[int, int]  # height, width
    image: np.ndarray | None = None  # its pixels before JPEG; None: copied without decoding


def encode(data: bytes, options: Options, items: Items) -> Encoded:
    """The member for an image of `items` as read. Raises BadImage."""
    if options.encoding == "copy":
        size = images.header_size(data)
        return Encoded(images.file_kind(data), data, size)
    if items.planes:
        if len(data) != planes.nbytes(*items.pixels[:2]):
            raise BadImage(f"{len(data)} bytes, not {planes.nbytes(*items.pixels[:2])}")
        image = planes.to_rgb(data, *items.pixels[:2])
    elif items.pixels:
        image = np.frombuffer(data, np.uint8).reshape(items.pixels)
    else:
        image = images.decode(data, options.resize, square=options.resize > 0 and options.fit == "crop")
    image = images.fit_image(image, options.resize, options.fit)
    if options.encoding == "raw":
        return Encoded(BARE["raw"], images.as_rgb(image).tobytes(), image.shape[:2], image)
    if options.encoding == "planes":
        return Encoded(BARE["planes"], _planes(data, image, options.quality, items), image.shape[:2], image)
    return Encoded("jpg", images.encode_jpeg(image, options.quality), image.shape[:2], image)


def _planes(data: bytes, image: np.ndarray, quality: int, items: Items) -> bytes:
    """The planes of an image: those of `data`, the image as read, where `image` has its size; else those of a JPEG."""
    size = image.shape[:2]
    if min(size) < planes.LEAST:
        raise BadImage(f"{size[1]}x{size[0]} pixels; --encoding planes needs {planes.LEAST} x {planes.LEAST} or more")
    if items.planes and size == items.pixels[:2]:
        return data
    header = None if items.pixels else images.jpeg_header(data)
    kept = planes.from_jpeg(data) if header and header[:2] == size else None
    return kept or planes.from_jpeg(images.encode_jpeg(image, quality))


class _ShardWriter:
    """The tar that is being written, and what its index and record will say."""

    def __init__(self, packing: Packing, file: "_HashedFile"):
        from webdataset import TarWriter  # takes 2 s, torch included

        self.packing = packing
        self.file = file
        # Without time, user and group, the same images give the same bytes.
        self.writer = TarWriter(file, encoder=False, mtime=0, user="", group="")
        self.members: list[tuple[Member, ...]] = []
        self.offset = 0  # of the next header in the tar
        self.labels: list[int] = []
        self.crc32: list[int] = []  # of the samples' members, in the order of the .idx
        self.bad: list[tuple[str, str]] = []  # name and reason of images left out
        self.size: tuple[int, int] | None = None  # height, width while all images agree; (0, 0): they do not
        self._sums: np.ndarray | None = None
        self._block = np.zeros(0)
        self._in_block = 0

    def add(self, row: int, data: bytes | BadImage) -> None:
        """Add an image. A bad one is noted and left out."""
        try:
            if isinstance(data, BadImage):
                raise data
            encoded = encode(data, self.packing.options, self.packing.items)
        except BadImage as error:
            self.bad.append((self.packing.items.name(row), str(error)))
            return
        self._note_size(encoded)
        label = int(self.packing.items.table["label"][row])
        key = f"{row:0{KEY_DIGITS}d}"
        members = {"cls": str(label).encode(), encoded.ending: encoded.payload}
        self.writer.write({"__key__": key, **members})
        entries, crc32 = [], 0
        for ext in sorted(members):  # the order in which TarWriter writes them
            crc32 = zlib.crc32(members[ext], crc32)
            entries.append(Member(ext, self.offset + BLOCK, len(members[ext]), f"{key}.{ext}"))
            self.offset += BLOCK + (len(members[ext]) + BLOCK - 1) // BLOCK * BLOCK
        self.members.append(tuple(entries))
        self.labels.append(label)
        self.crc32.append(crc32)

    def _note_size(self, encoded: Encoded) -> None:
        """Note whether all images have one size, and sum up their pixels as long as they have."""
        if self.size is None:
            self.size = encoded.size
            if encoded.image is not None and self.size[0] * self.size[1] <= MEAN_PIXELS:
                self._sums = np.zeros((*self.size, 3), np.uint32)
                self._block = np.zeros((*self.size, 3), np.uint16)
        if self.size != encoded.size:
            if self.packing.options.encoding in BARE:
                raise InputError(f"{self.packing.options.encoding} {SIZES_DIFFER}")
            self.size, self._sums = (0, 0), None
        elif self._sums is not None:
            self._add_to_sums(encoded.image)

    def _add_to_sums(self, image: np.ndarray) -> None:
        # Integers: the sum is exact, whatever the order of adding. 257 times 255 fits in 16 bits, and adding 16-bit
        # numbers takes 17 us where 32 bits take 34 (256x256).
        self._block += image if image.ndim == 3 else image[:, :, None]
        self._in_block += 1
        if self._in_block == 257:
            self._flush_sums()

    def _flush_sums(self) -> None:
        self._sums += self._block
        self._block[:] = 0
        self._in_block = 0

    @property
    def sums(self) -> np.ndarray | None:
        """Sums of the stored pixels before JPEG, uint32 (H, W, 3), or None where the images are not of one size."""
        if self._sums is not None:
            self._flush_sums()
        return self._sums

    def close(self) -> None:
        """End the tar. After a write error nothing more is written: it would only raise the same error again."""
        if self.file.failed:
            self.file.discard = True
        self.writer.close()

    def record(self, shard: int) -> ShardRecord:
        """The record of the shard, whose number is given."""
        digest, summed = self.file.sha256.hexdigest(), self._sums is not None
        return ShardRecord(shard, len(self.members), self.file.size, digest, self.size or (0, 0), summed, self.bad)


class _HashedFile:
    """A file for TarWriter that counts and hashes what is written."""

    def __init__(self, file):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.failed = False
        self.discard = False

    def write(self, data: bytes) -> int:
        if not self.discard:
            self.failed = True
            self._file.write(data)
            self.failed = False
            self.sha256.update(data)
            self.size += len(data)
        return len(data)


def write_error(dest: str, error: OSError) -> InputError:
    """The InputError for an OSError that was raised while DEST was written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += "; make room"
    return InputError(
        f"cannot write to {dest}: {reason}; finished shards are kept, and the same command carries on",
        everywhere=False,
    )
