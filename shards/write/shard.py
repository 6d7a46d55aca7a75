"""Writes one shard: reads its images ahead, decodes, fits and encodes them, writes tar and index, sums up the mean.

In: a `Job`, the number of the shard. Out: DEST/<split>-000000.tar and .idx under their final names only when whole,
and a record of them in DEST/.pack. The bytes depend on the job alone: any process on any machine writes the same.
"""

import collections
import concurrent.futures
import dataclasses
import errno
import hashlib
import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from shards.errors import InputError
from shards.format.split import Member, format_idx, idx_path
from shards.machine.files import sync_folder, write_whole
from shards.read import images
from shards.read.images import BadImage
from shards.sources.items import Items, Reader, load_table

STATE = ".pack"  # folder in DEST: settings, tables, records, unfinished shards
BLOCK = 512  # bytes of a tar header, and what members are padded to
KEY_DIGITS = 8
_READ_THREADS = 4  # enough to hide a network file system's latency behind decoding
_READ_CHUNK = 4  # images that a thread reads in a turn
_CHUNKS_AHEAD = 4
# Seconds an image, in so many chunks in a row, above which reading is left to threads for the rest of the shard. From
# the page cache an image takes 20 us, and handing it over from a thread 65 us: a twentieth of packing it.
_SLOW_READ, _SLOW_CHUNKS = 2e-4, 2
MEAN_PIXELS = 1 << 22  # no mean image is made of larger images: it would be larger than the rest of the process
SIZES_DIFFER = "raw images must all have one size, and these differ; give --resize with --fit crop or squash"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is done to every image."""

    resize: int = 256  # pixels; 0: sizes are kept
    fit: str = "crop"  # crop, squash, none
    encoding: str = "jpeg"  # jpeg, raw, copy
    quality: int = 90


@dataclasses.dataclass(frozen=True)
class Job:
    """One split to be packed. `items` may come without its arrays: they are then mapped from DEST/.pack."""

    dest: str
    items: Items
    options: Options
    nshards: int

    @property
    def nsamples(self) -> int:
        return len(self.items.table)

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
    """Packs shards of some jobs, one at a time, in this process."""

    def __init__(self, jobs: list[Job]):
        import torch

        torch.set_num_threads(1)  # as many processes as cores run already
        self.jobs = [
            job if len(job.items.table) else dataclasses.replace(job, items=load_table(job.items, job.state("")))
            for job in jobs
        ]
        self._readers = [Reader(job.items) for job in self.jobs]
        self._pool = concurrent.futures.ThreadPoolExecutor(_READ_THREADS, "read")

    def close(self) -> None:
        """Stop reading ahead and close the source's archives."""
        self._pool.shutdown(cancel_futures=True)
        for reader in self._readers:
            reader.close()

    def pack(self, job_number: int, shard: int, tick: Callable[[int], None]) -> dict:
        """Write one shard and its record; the record. `tick(images)` is called now and then, and may raise.

        Raises:
            InputError: the source cannot be read or DEST not be written. Nothing of the shard is left then.
        """
        job = self.jobs[job_number]
        tar = job.tar(shard)
        temporary = job.state(f"{os.path.basename(tar)}.{os.uname().nodename}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb", buffering=1 << 20) as file:
                written = _Shard(job, _HashedFile(file))
                try:
                    for row, data in self._read_ahead(job_number, *bounds(job.nsamples, job.nshards, shard)):
                        written.add(row, data)
                        tick(1)
                finally:
                    written.close()
                file.flush()
                os.fsync(file.fileno())
            write_whole(idx_path(tar), format_idx(written.members))
            _save_array(job.columns(shard), np.array([written.labels, written.crc32], np.uint32))
            if written.sums is not None:
                _save_array(job.sums(shard), written.sums)
            os.replace(temporary, tar)
            sync_folder(job.dest)
            record = written.record(shard)
            write_whole(job.record(shard), (json.dumps(record) + "\n").encode())
            return record
        except OSError as error:
            raise write_error(job.dest, error) from None
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def _read_ahead(self, job_number: int, first: int, last: int) -> Iterator[tuple[int, bytes | BadImage]]:
        """Bytes of the images first .. last-1 in order; where reading is slow, read by threads ahead of their use."""
        reader = self._readers[job_number]

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


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The image member of a sample."""

    ending: str
    payload: bytes
    size: tuple[int, int]  # height, width
    image: np.ndarray | None = None  # its pixels before JPEG; None: copied without decoding


def encode(data: bytes, options: Options, pixels: tuple[int, ...] | None) -> Encoded:
    """The member for an image as read. `pixels`: shape where `data` is bare pixels. Raises BadImage."""
    if options.encoding == "copy":
        size = images.header_size(data)
        return Encoded(images.file_kind(data), data, size)
    if pixels:
        image = np.frombuffer(data, np.uint8).reshape(pixels)
    else:
        image = images.decode(data, options.resize, square=options.resize > 0 and options.fit == "crop")
    image = images.fit_image(image, options.resize, options.fit)
    if options.encoding == "raw":
        return Encoded("raw", images.as_rgb(image).tobytes(), image.shape[:2], image)
    return Encoded("jpg", images.encode_jpeg(image, options.quality), image.shape[:2], image)


class _Shard:
    """The tar that is being written, and what is to be known of it."""

    def __init__(self, job: Job, file: "_HashedFile"):
        from webdataset import TarWriter  # costs 2 s, torch included: --help must not pay for it

        self.job = job
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
        """One image; one that is bad is noted and left out."""
        try:
            if isinstance(data, BadImage):
                raise data
            encoded = encode(data, self.job.options, self.job.items.pixels)
        except BadImage as error:
            self.bad.append((self.job.items.name(row), str(error)))
            return
        self._note_size(encoded)
        label = int(self.job.items.table["label"][row])
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
        """Follow whether all images are of one size, and sum up their pixels while they are."""
        if self.size is None:
            self.size = encoded.size
            if encoded.image is not None and self.size[0] * self.size[1] <= MEAN_PIXELS:
                self._sums = np.zeros((*self.size, 3), np.uint32)
                self._block = np.zeros((*self.size, 3), np.uint16)
        if self.size != encoded.size:
            if encoded.ending == "raw":
                raise InputError(SIZES_DIFFER)
            self.size, self._sums = (0, 0), None
        elif self._sums is not None:
            self._add_to_sums(encoded.image)

    def _add_to_sums(self, image: np.ndarray) -> None:
        # Whole numbers: the sum is exact, so its bits do not depend on who adds what first. 257 images of 255 fit
        # into 16 bits, and adding to those takes 17 us where 32 bits take 34 (256x256).
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
        """End the tar. After an error the end goes nowhere, for it would only raise the same error again."""
        if self.file.failed:
            self.file.discard = True
        self.writer.close()

    def record(self, shard: int) -> dict:
        """What finishing the split needs to know of this shard."""
        return {
            "shard": shard,
            "nsamples": len(self.members),
            "filesize": self.file.size,
            "sha256": self.file.sha256.hexdigest(),
            "size": list(self.size or (0, 0)),
            "summed": self._sums is not None,
            "bad": self.bad,
        }


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
    """The message for an error while DEST is written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason += "; make room"
    return InputError(
        f"cannot write to {dest}: {reason}; finished shards are kept, then the same command carries on",
        everywhere=False,
    )


def _save_array(path: str, values: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, values)
    write_whole(path, file.getvalue())
