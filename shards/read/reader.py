"""Reads single samples from the tars of a split, in any order, through its indexes.

In: a split, the number of a shard and of a sample in it. Out: the bytes of the image member. If a shard cannot be used,
an InputError names it; if only this sample cannot be used, a DamagedSample is raised.
"""

import array
import collections
import dataclasses
import errno
import operator
import os
import resource
import time

from shards.errors import InputError, few
from shards.format.split import BARE, IMAGE_EXTENSIONS, INDEX_VERSION, Member, Shard, Split, image_member, read_idx
from shards.format.tar import BLOCK, header_size, is_header_of, refuse_foreign
from shards.machine import remote
from shards.machine.files import check_regular, is_remote, read_file

# Environment variable: a folder on the node's own disk for copies of remote shards. Without it every image is a request
# of its own, which is good enough for a try only.
CACHE_VARIABLE = "SHARDS_CACHE"

# Shards that a reader keeps open: a shuffle window of 64 streams touches about 320.
_OPEN_SHARDS = 512
_SPARE_FILES = 64  # descriptors left to the rest of the process

# Errors of a file system that may pass: a failing disk path, a stale NFS handle after a fail-over, a lost server.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.ENOTCONN, errno.ECONNRESET)
_PAUSES = (0.1, 0.5, 2.0)  # seconds before each of the three further tries

# An open file can still be read after it was deleted or replaced: check a shard in use this often.
_LOOK_AGAIN_SECONDS = 10.0


class DamagedSample(Exception):
    """One sample that cannot be used. The message says why."""


@dataclasses.dataclass
class _Open:
    """A shard in use: where the image members lie (bytes), and the descriptor of its tar (-1: remote)."""

    path: str
    offsets: array.array
    sizes: array.array
    descriptor: int
    filesize: int
    looked: float  # time.monotonic() of the last look at the file


class ShardReader:
    """Images of a split by (shard, sample). Not for use by several threads. A context manager."""

    def __init__(self, split: Split):
        self.split = split
        self._open: collections.OrderedDict[int, _Open] = collections.OrderedDict()
        self._limit = _descriptor_limit()
        self._buffer = memoryview(bytearray(1 << 18))

    def read(self, shard: int, sample: int) -> memoryview:
        """Bytes of an image member, valid until the next call.

        Raises:
            DamagedSample: the tar header before it is not the member's.
            InputError: the shard or its index is missing, cut off, unreadable, or they do not belong together.
        """
        entry = self._entry(shard)
        offset, size = entry.offsets[sample], entry.sizes[sample]
        data = self._pread(shard, entry, offset - BLOCK, size + BLOCK)
        if not _is_header(data[:BLOCK], size):
            raise DamagedSample(f"its tar header at byte {offset - BLOCK} is damaged")
        return data[BLOCK:]

    def close(self) -> None:
        """Close all shards."""
        while self._open:
            self._forget(next(iter(self._open)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _entry(self, shard: int) -> _Open:
        entry = self._open.get(shard)
        if entry is None:
            while len(self._open) >= self._limit:
                self._forget(next(iter(self._open)))
            entry = self._open[shard] = self._retry(shard, lambda: self._open_shard(self.split.shards[shard]))
        elif entry.descriptor >= 0 and time.monotonic() - entry.looked > _LOOK_AGAIN_SECONDS:
            self._look_again(shard, entry)
        self._open.move_to_end(shard)
        return entry

    def _forget(self, shard: int) -> None:
        entry = self._open.pop(shard, None)
        if entry is not None and entry.descriptor >= 0:
            os.close(entry.descriptor)

    def _open_shard(self, shard: Shard) -> _Open:
        path = self.split.path(shard.url)
        offsets, sizes, first, last = _image_members(self.split, shard)
        end = max(map(operator.add, offsets, sizes))
        if is_remote(path):
            cache = os.environ.get(CACHE_VARIABLE)
            if not cache:
                return _Open(path, offsets, sizes, -1, 0, 0.0)
            path = remote.cached(path, cache, shard.filesize, shard.sha256)
        check_regular(path)  # opening a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            filesize = os.fstat(descriptor).st_size
            self._check_size(path, shard, filesize, end)
            for member in (first, last):
                header = os.pread(descriptor, BLOCK, member.offset - BLOCK)
                if not is_header_of(header, member):
                    refuse_foreign(path)
                    raise InputError(
                        f"{self.split.idx_path(shard)} does not belong to {path}: {member.name or 'a member'} is not "
                        f"at byte {member.offset}; python -m shards.index {self.split.root} makes the index anew",
                        everywhere=False,
                    )
        except BaseException:
            os.close(descriptor)
            raise
        return _Open(path, offsets, sizes, descriptor, filesize, time.monotonic())

    def _check_size(self, path: str, shard: Shard, filesize: int, end: int) -> None:
        expected = shard.filesize or end
        if filesize < expected:
            refuse_foreign(path)
            raise InputError(
                f"{path} ends early: it has {filesize} bytes of {expected}; copy or pack that shard again",
                everywhere=False,
            )
        if shard.filesize and filesize > expected:
            refuse_foreign(path)
            raise InputError(
                f"{path} has {filesize} bytes, {self.split.name}.json says {expected}: it was changed; "
                f"python -m shards.index {self.split.root} makes the index anew",
                everywhere=False,
            )

    def _look_again(self, shard: int, entry: _Open) -> None:
        """Raise InputError when a shard in use has vanished or was cut off."""
        entry.looked = time.monotonic()
        filesize = self._retry(shard, lambda: os.stat(entry.path).st_size)
        if filesize != entry.filesize:
            expected = dataclasses.replace(self.split.shards[shard], filesize=entry.filesize)
            self._check_size(entry.path, expected, filesize, entry.filesize)

    def _pread(self, shard: int, entry: _Open, offset: int, size: int) -> memoryview:
        if entry.descriptor < 0:
            return memoryview(remote.read_range(entry.path, offset, size))
        if size > len(self._buffer):
            self._buffer = memoryview(bytearray(size + size // 2))
        target = self._buffer[:size]
        try:
            got = os.preadv(entry.descriptor, [target], offset)
        except OSError:
            got = -1  # _retry succeeds or reports it
        if got != size:
            self._retry(shard, lambda: self._read_fully(shard, target, offset))
        return target

    def _read_fully(self, shard: int, target: memoryview, offset: int) -> None:
        """Fill `target` from a file that is opened again: after a fail-over of the server an old handle stays stale."""
        self._forget(shard)
        entry = self._open[shard] = self._open_shard(self.split.shards[shard])
        done = 0
        while done < len(target):
            got = os.preadv(entry.descriptor, [target[done:]], offset + done)
            if not got:
                raise InputError(f"{entry.path} ends early; copy or pack that shard again", everywhere=False)
            done += got

    def _retry(self, shard: int, action):
        """The result of `action()`, with three further tries after errors that may pass."""
        for pause in (*_PAUSES, None):
            try:
                return action()
            except OSError as error:
                path = self.split.path(self.split.shards[shard].url)
                if isinstance(error, FileNotFoundError):
                    message = f"{path} is not there; restore it, or make a new index without it"
                    raise InputError(message, everywhere=False) from None
                if error.errno not in _PASSING or pause is None:
                    tried = f" ({1 + len(_PAUSES)} times)" if pause is None else ""
                    message = f"cannot read {path}{tried}: {error.strerror or error}"
                    raise InputError(message, everywhere=False) from None
                time.sleep(pause)


def _descriptor_limit() -> int:
    """How many shards may be open: _OPEN_SHARDS, or what the system allows. Raises the soft limit if necessary."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_SHARDS + _SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(_OPEN_SHARDS, soft - _SPARE_FILES)) if soft != resource.RLIM_INFINITY else _OPEN_SHARDS


def _is_header(header: memoryview, size: int) -> bool:
    """Whether a block is the tar header of a member of `size` bytes."""
    if header[257:262] == b"ustar":
        try:
            if int(bytes(header[124:135]), 8) == size:
                return True
        except ValueError:
            pass  # another way to write a number, or damage
    return header_size(bytes(header)) == size


def _image_members(split: Split, shard: Shard) -> tuple[array.array, array.array, Member, Member]:
    """Offsets and sizes of the image members of a shard, in bytes, and the first and the last member."""
    found = _regular_index(split, shard)
    if found is None:
        members = [_image_of(split, shard, number, s) for number, s in enumerate(read_idx(split, shard))]
        found = array.array("q", [m.offset for m in members]), array.array("q", [m.size for m in members]), members
    offsets, sizes, members = found
    if not offsets:
        raise InputError(f"{split.idx_path(shard)} lists no samples", everywhere=False)
    return offsets, sizes, members[0], members[-1]


def _regular_index(split: Split, shard: Shard) -> tuple[array.array, array.array, list[Member]] | None:
    """The same from an .idx in which every line has the same two members, as shards.pack writes it; None: it has not.

    It takes 0.5 ms for 1,000 samples, a fifth of making an object of every member: a reader that starts in the middle
    of an epoch needs the indexes of a hundred shards at once.
    """
    path = split.idx_path(shard)
    try:
        words = read_file(path).split()
    except OSError:
        return None  # read_idx reports it
    if words[:1] != [INDEX_VERSION.encode()] or len(words) != 2 + 8 * shard.nsamples or not shard.nsamples:
        return None
    exts = [set(words[at::8]) for at in (2, 6)]
    if any(len(kinds) > 1 for kinds in exts):
        return None
    pair = tuple(Member(min(kinds).decode("utf-8", "surrogateescape"), 0, 0, "") for kinds in exts)
    image = image_member(pair, split.encoding)
    if image is None:
        return None
    at = 2 if image is pair[0] else 6
    try:
        offsets = array.array("q", map(int, words[at + 1 :: 8]))
        sizes = array.array("q", map(int, words[at + 2 :: 8]))
    except ValueError:
        return None
    names = [words[i].decode("utf-8", "surrogateescape") for i in (at + 3, at - 7)]  # of the first and the last line
    ends = [Member("", offsets[i], sizes[i], name) for i, name in zip((0, -1), names, strict=True)]
    return offsets, sizes, ends


def _image_of(split: Split, shard: Shard, number: int, sample: tuple[Member, ...]) -> Member:
    """The image of a sample. Raises InputError if it has none."""
    image = image_member(sample, split.encoding)
    if image is None:
        found = few((member.ext for member in sample), separator=", ")
        endings = (BARE[split.encoding],) if split.encoding in BARE else IMAGE_EXTENSIONS
        raise InputError(
            f"{split.path(shard.url)}: sample {number} has no image member ({found}); "
            f"images end in {', '.join('.' + ext for ext in endings)}",
            everywhere=False,
        )
    return image
