"""Small shards for tests of reading: any images, any shard sizes, by the tar writer of Python's library.

In: a folder, shard sizes, a function that makes the image member of a sample. Out: the split as training loads it.
"""

import io
import os
import tarfile

import numpy as np

from shards.format.split import Shard, Split, format_idx, load_split, save_column, save_split
from shards.format.tar import scan
from shards.machine.files import write_whole


def raw_image(number: int, side: int) -> np.ndarray:
    """(side, side, 3): a pixel tells its row, its column and its image."""
    image = np.empty((side, side, 3), np.uint8)
    image[..., 0] = np.arange(side)[:, None]
    image[..., 1] = np.arange(side)
    image[..., 2] = number % 251
    return image


def write_split(folder, sizes, side=8, member=None, labels=None, name="train", classes=(), fixed=True) -> Split:
    """Write shards of `sizes` samples. `member(number)` gives ending and bytes of an image; None: raw pixels.

    The label of a sample is its number, where `labels` does not say otherwise.
    """
    folder = str(folder)
    os.makedirs(folder, exist_ok=True)
    raw = member is None
    shards, number = [], 0
    for index, size in enumerate(sizes):
        path = os.path.join(folder, f"{name}-{index:06d}.tar")
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(size):
                ext, data = ("raw", raw_image(number, side).tobytes()) if raw else member(number)
                add(tar, f"{number:08d}.{ext}", data)
                add(tar, f"{number:08d}.cls", str(number).encode())
                number += 1
        with open(path, "rb") as file:
            write_whole(path.removesuffix(".tar") + ".idx", format_idx(scan(file, path)))
        shards.append(Shard(os.path.basename(path), size, os.path.getsize(path)))
    labels = np.arange(number) if labels is None else labels
    digest = save_column(folder, f"{name}.labels.npy", np.asarray(labels, np.int32))
    split = Split(
        name=name,
        root=folder,
        shards=tuple(shards),
        classes=tuple(classes),
        encoding="raw" if raw else "jpeg",
        height=side if fixed else 0,
        width=side if fixed else 0,
        labels=f"{name}.labels.npy",
        labels_sha256=digest,
    )
    save_split(split, os.path.join(folder, f"{name}.json"))
    return load_split(folder, name)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def damage(split: Split, shard: int, offset: int, data: bytes) -> None:
    """Overwrite bytes of a tar."""
    with open(split.path(split.shards[shard].url), "r+b") as file:
        file.seek(offset)
        file.write(data)


def image_offset(split: Split, shard: int, sample: int) -> int:
    """Bytes from the start of a tar to the data of a sample's image member."""
    with open(split.path(split.shards[shard].url), "rb") as file:
        return scan(file, "")[sample][0].offset
