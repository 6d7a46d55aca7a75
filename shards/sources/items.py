"""The images of one split of a source, as flat arrays: where the bytes of each are, its label and its name.

In: rows, one per image. Out: `Items` (32 bytes per image, and its name), saved to two files that all packing processes
map into memory; `SourceReader`, which reads the bytes of any image.
"""

import array
import collections
import dataclasses
import errno
import hashlib
import os
import threading

import numpy as np

from shards.errors import InputError
from shards.read.images import BadImage

ROW = np.dtype([("label", "<i4"), ("file", "<i4"), ("offset", "<i8"), ("size", "<i8"), ("name", "<i8")])
WHOLE_FILE = -1  # `offset` of an image that is a file of its own: files[file]/name
MAX_FILE_BYTES = 1 << 26  # an image file larger than this is refused unread; the read-ahead holds a few of them
_OPEN_FILES = 64  # archives that a SourceReader keeps open


@dataclasses.dataclass(frozen=True)
class Items:
    """All images of a split."""

    split: str
    files: tuple[str, ...]  # archives, or the one folder that the names are relative to
    table: np.ndarray  # ROW (n,); `name` is where the name starts in `names`
    names: np.ndarray  # uint8: all names, each ended by a zero byte
    classes: tuple[str, ...]
    wnids: tuple[str, ...] = ()  # WordNet ids of the classes, if known
    pixels: tuple[int, ...] | None = None  # (height, width) or (height, width, 3) of bare pixels; None: image files
    planes: bool = False  # the bare pixels are stored as shards.read.planes
    mean: str = ""  # file of the mean image, if the source has one
    gzipped: bool = False  # files[0] must be unpacked before images can be read from it
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)  # number of other files by ending

    def name(self, row: int) -> str:
        """Name of an image in its source, for messages."""
        start = int(self.table["name"][row])
        stop = start
        while self.names[stop]:
            stop += 1
        return os.fsdecode(self.names[start:stop].tobytes())

    def digest(self) -> str:
        """Hex digest that is the same for the same images in the same order, wherever the source is mounted."""
        sha = hashlib.sha256(repr((self.split, [os.path.basename(f) for f in self.files], self.pixels)).encode())
        sha.update(b"planes" * self.planes)
        for part in (self.table, self.names):
            sha.update(np.ascontiguousarray(part).view(np.uint8))
        return sha.hexdigest()


class Rows:
    """Builds `Items`: a million rows without a million objects."""

    def __init__(self):
        self._columns = {column: array.array("q") for column in ROW.names}
        self._names = bytearray()

    def add(self, name: str, label: int, file: int = 0, offset: int = WHOLE_FILE, size: int = 0) -> None:
        """Add an image. `size` may be 0 for a WHOLE_FILE."""
        for column, value in zip(ROW.names, (label, file, offset, size, len(self._names)), strict=True):
            self._columns[column].append(value)
        self._names += os.fsencode(name) + b"\0"

    def __len__(self) -> int:
        return len(self._columns["label"])

    def labels(self) -> array.array:
        """Labels so far."""
        return self._columns["label"]

    def items(self, split: str, files: list[str], classes: list[str], **more) -> Items:
        """The finished table."""
        table = np.empty(len(self), ROW)
        for column, values in self._columns.items():
            table[column] = values
        names = np.frombuffer(bytes(self._names), np.uint8)
        return Items(split, tuple(files), table, names, tuple(classes), **more)


def table_paths(folder: str, split: str) -> tuple[str, str]:
    """Paths of the files of save_table: rows and names of a split."""
    return os.path.join(folder, f"{split}.items.npy"), os.path.join(folder, f"{split}.names.npy")


def save_table(items: Items, folder: str) -> None:
    """Write rows and names for the packing processes."""
    for path, part in zip(table_paths(folder, items.split), (items.table, items.names), strict=True):
        np.save(path, part)


def load_table(items: Items, folder: str) -> Items:
    """`items` with its arrays mapped from save_table's files: one copy in memory for all processes of a machine."""
    rows, names = (np.load(path, mmap_mode="r") for path in table_paths(folder, items.split))
    return dataclasses.replace(items, table=rows, names=names)


def without_table(items: Items) -> Items:
    """`items` without its arrays: small enough to be sent to another process."""
    return dataclasses.replace(items, table=np.empty(0, ROW), names=np.empty(0, np.uint8))


class SourceReader:
    """Reads the bytes of single images; safe for several threads at once."""

    def __init__(self, items: Items):
        self.items = items
        self._open: collections.OrderedDict[int, int] = collections.OrderedDict()
        self._retired: list[int] = []
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        """Bytes of an image file, or of bare pixels.

        Raises:
            BadImage: the file is too large to be an image.
            InputError: it cannot be read, or the archive ends before it.
        """
        entry = self.items.table[row]
        file, offset, size = int(entry["file"]), int(entry["offset"]), int(entry["size"])
        path = self.items.files[file]
        try:
            if offset == WHOLE_FILE:
                path = os.path.join(path, self.items.name(row))
                with open(path, "rb", buffering=0) as whole:
                    size = os.fstat(whole.fileno()).st_size
                    if size > MAX_FILE_BYTES:
                        raise BadImage(f"a file of {size:,} bytes")
                    data = whole.read()
            else:
                if size > MAX_FILE_BYTES:
                    raise BadImage(f"a file of {size:,} bytes")
                data = os.pread(self._descriptor(file), size, offset)
        except OSError as error:
            raise InputError(
                f"cannot read {path}: {os.strerror(error.errno or errno.EIO)}; finished shards are kept, and the same "
                "command carries on",
                everywhere=False,
            ) from None
        if len(data) != size:
            raise InputError(f"{path} ends within {self.items.name(row)}: it was cut off or changed", everywhere=False)
        return data

    def _descriptor(self, file: int) -> int:
        with self._lock:
            descriptor = self._open.get(file)
            if descriptor is None:
                if len(self._open) >= _OPEN_FILES:
                    # Another thread may be reading from the oldest one, so that is closed only later.
                    while len(self._retired) >= _OPEN_FILES:
                        os.close(self._retired.pop(0))
                    self._retired.append(self._open.popitem(last=False)[1])
                descriptor = self._open[file] = os.open(self.items.files[file], os.O_RDONLY | os.O_CLOEXEC)
            return descriptor

    def close(self) -> None:
        """Close the archives."""
        for descriptor in [*self._open.values(), *self._retired]:
            os.close(descriptor)
        self._open.clear()
        self._retired.clear()
