"""IDX files: the format of MNIST, Fashion-MNIST and EMNIST.

In: a folder with train-images-idx3-ubyte[.gz], its labels, and the same of t10k, which is the validation split. Out:
`Items` of bare pixels.
"""

import gzip
import os
import struct
import zlib

import numpy as np

from shards.errors import InputError
from shards.sources.items import Items, Rows

_SPLITS = {"train": "train", "t10k": "val"}  # by the first word of a file's name
_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, struct.error)


def holds_idx(folder: str) -> bool:
    """Whether a folder holds images of one of the splits."""
    return any(_path(folder, f"{prefix}-images", 3) for prefix in _SPLITS)


def _path(folder: str, stem: str, dimensions: int) -> str:
    """Path of an IDX file under one of its usual names, or an empty string."""
    for middle in ("-", "."):
        for ending in (".gz", ""):
            path = os.path.join(folder, f"{stem}{middle}idx{dimensions}-ubyte{ending}")
            if os.path.isfile(path):
                return path
    return ""


def read_idx_files(source: str, split: str) -> list[Items]:
    """The splits in a folder. `split`: name of the only one. Raises InputError if a file is missing or damaged."""
    prefixes = [prefix for prefix in _SPLITS if _path(source, f"{prefix}-images", 3)]
    found = []
    for prefix in prefixes:
        name = _SPLITS[prefix] if not split or len(prefixes) > 1 else split
        images, labels = _path(source, f"{prefix}-images", 3), _path(source, f"{prefix}-labels", 1)
        if not labels:
            raise InputError(f"{prefix}-labels-idx1-ubyte.gz is missing in {source}")
        count, height, width = _header(images, 3)
        values = _labels(labels)
        if len(values) != count:
            raise InputError(f"{images} holds {count} images, {labels} {len(values)} labels")
        rows = Rows()
        for i, label in enumerate(values.tolist()):
            rows.add(f"{prefix} image {i}", label, 0, 16 + i * height * width, height * width)
        found.append((name, images, rows, (height, width), int(values.max(initial=0))))
    classes = _class_names(source, 1 + max(last for *_, last in found))
    return [
        rows.items(name, [images], classes, pixels=pixels, gzipped=images.endswith(".gz"))
        for name, images, rows, pixels, _ in found
    ]


def _header(path: str, dimensions: int) -> tuple[int, ...]:
    """Sizes of an IDX file of bytes. Source: the description of the format on the MNIST page, yann.lecun.com."""
    try:
        magic, *sizes = struct.unpack(f">{1 + dimensions}i", _read(path, 4 + 4 * dimensions))
    except _DAMAGE as error:
        raise InputError(f"{path} is not an IDX file: {error}") from None
    if magic != 0x800 + dimensions or min(sizes) < 0:
        raise InputError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    return tuple(sizes)


def _read(path: str, size: int) -> bytes:
    """The first `size` bytes of a file, unpacked if its name ends in .gz."""
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        return file.read(size)


def _labels(path: str) -> np.ndarray:
    (count,) = _header(path, 1)
    try:
        values = np.frombuffer(_read(path, 8 + count), np.uint8, offset=8)
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if len(values) != count:
        raise InputError(f"{path} was cut off: {len(values)} of {count} labels")
    return values


def unpack_idx(items: Items, folder: str) -> str:
    """Unpack the gzipped images of a split into `folder`; the path of the plain file. Raises InputError if damaged."""
    path = os.path.join(folder, f"{items.split}.idx3-ubyte")
    height, width = items.pixels
    with gzip.open(items.files[0], "rb") as packed, open(path, "wb") as file:
        try:
            while piece := packed.read(1 << 20):
                file.write(piece)
        except _DAMAGE as error:
            raise InputError(f"{items.files[0]} is damaged: {error}") from None
        size = file.tell()
    if size < 16 + len(items.table) * height * width:
        raise InputError(f"{items.files[0]} was cut off: it unpacks to {size} bytes")
    return path


def _class_names(source: str, count: int) -> list[str]:
    """The lines of classes.txt beside the data; without that file, the numbers."""
    path = os.path.join(source, "classes.txt")
    if not os.path.isfile(path):
        return [str(label) for label in range(count)]
    with open(path, encoding="utf-8") as file:
        names = [line.strip() for line in file if line.strip()]
    if len(names) < count:
        raise InputError(f"{path} names {len(names)} classes, the data has labels up to {count - 1}")
    return names
