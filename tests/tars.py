"""Small shard sets for the tests: images, tars in any form, and splits as shards.pack would write them."""

import functools
import hashlib
import io
import json
import os
import tarfile
import zlib

import numpy as np
from PIL import Image

from shards.format import tar
from shards.format.split import Shard, Split, format_idx, save_column, save_split


@functools.cache
def image(number: int, size: int = 48, kind: str = "JPEG") -> bytes:
    """An image file that no other number gives."""
    rng = np.random.default_rng(number)
    pixels = np.kron(rng.integers(0, 256, (size // 8, size // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_tar(path, entries, format=tarfile.USTAR_FORMAT, end_mark: bool = True) -> None:
    """Write (name, bytes) pairs as a tar; without `end_mark` it ends with the last member's padding."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        used = archive.offset
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(buffer.getvalue() if end_mark else buffer.getvalue()[:used])


def sample(number: int, label: int, size: int = 48) -> list[tuple[str, bytes]]:
    """Members of a packed sample."""
    return [(f"{number:08d}.cls", str(label).encode()), (f"{number:08d}.jpg", image(number, size))]


def make_split(folder, shards=(6, 6), classes: int = 5, name: str = "train", checksums: bool = True) -> Split:
    """Write a split as shards.pack does: sample i has label i % classes."""
    folder = str(folder)
    entries, labels, crcs, number = [], [], [], 0
    for k, count in enumerate(shards):
        url = f"{name}-{k:06d}.tar"
        path = os.path.join(folder, url)
        members = []
        for _ in range(count):
            own = sample(number, number % classes)
            members += own
            labels.append(number % classes)
            crcs.append(zlib.crc32(b"".join(data for _, data in own)))
            number += 1
        write_tar(path, members)
        with open(path, "rb") as file:
            found = tar.scan(file, url)
            data = file.read()
        with open(path.removesuffix(".tar") + ".idx", "wb") as file:
            file.write(format_idx(found))
        sha256 = hashlib.sha256(data).hexdigest() if checksums else ""
        entries.append(Shard(url, count, len(data) if checksums else 0, sha256))
    column = f"{name}.labels.npy"
    split = Split(
        name,
        folder,
        tuple(entries),
        tuple(f"class {i}" for i in range(classes)),
        labels=column,
        labels_sha256=save_column(folder, column, np.array(labels, np.int32)),
    )
    if checksums:
        column = f"{name}.crc32.npy"
        fields = {"crc32": column, "crc32_sha256": save_column(folder, column, np.array(crcs, np.uint32))}
        split = Split(**{**vars(split), **fields})
    counts = np.bincount(labels, minlength=classes).tolist()
    save_split(split, os.path.join(folder, f"{name}.json"), class_counts=counts, seed=7)
    return split


def edit_json(path, **changes) -> None:
    """Change fields of a JSON file."""
    with open(path) as file:
        fields = json.load(file)
    with open(path, "w") as file:
        json.dump({**fields, **changes}, file)


def flip(path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))
