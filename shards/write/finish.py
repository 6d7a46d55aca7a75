"""Finishes packed splits: writes mean.npy and `<split>.json` from the records of the shards, and says what was packed.

In: packings and the records of all their shards. Out: the files that make a folder of shards a data set.
"""

import os

import numpy as np

from shards.errors import InputError
from shards.format.split import BARE, Shard, Split, npy_bytes, save_index
from shards.machine.files import write_whole
from shards.sources.items import table_paths
from shards.write.plan import MEAN
from shards.write.shard import MEAN_PIXELS, SIZES_DIFFER, Packing, ShardId, ShardRecord


def finish(packings: list[Packing], records: dict[ShardId, ShardRecord], max_bad: int, worked: bool) -> None:
    """Finish all splits. `worked`: this run has packed a shard.

    Raises:
        InputError: more than `max_bad` images were left out; nothing is written then, and no shard lost.
    """
    own = [[records[ShardId(n, k)] for k in range(packing.nshards)] for n, packing in enumerate(packings)]
    bad = [
        (packing.items.split, *entry)
        for packing, of_split in zip(packings, own, strict=True)
        for record in of_split
        for entry in record.bad
    ]
    if bad:
        path = packings[0].state("bad.txt")
        text = "".join(f"{split}\t{name}\t{reason}\n" for split, name, reason in bad)
        write_whole(path, text.encode("utf-8", "surrogateescape"))
        if len(bad) > max_bad:
            raise InputError(
                f"{len(bad):,} images cannot be decoded, {first_bad(records)}; all are listed in {path}. The rest is "
                f"packed: the same command with --max-bad {len(bad)} leaves them out"
            )
        print(f"left out {len(bad):,} images that cannot be decoded: {path}")
    for packing, of_split in zip(packings, own, strict=True):
        _finish_split(packing, of_split, worked)


def first_bad(records: dict[ShardId, ShardRecord]) -> str:
    """The first image that was left out, for a message."""
    name, reason = next(entry for record in records.values() for entry in record.bad)
    return f"the first is {name}: {reason}"


def _finish_split(packing: Packing, records: list[ShardRecord], worked: bool) -> None:
    """Write the index of a split, for train also mean.npy; remove what only an unfinished run needs."""
    split = packing.items.split
    nsamples = sum(record.nsamples for record in records)
    if not nsamples:
        raise InputError(f"no image of split {split!r} can be decoded")
    sizes = {tuple(record.size) for record in records if record.nsamples}
    height, width = sizes.pop() if len(sizes) == 1 else (0, 0)
    encoding = packing.options.encoding
    if encoding in BARE and not height:
        raise InputError(f"{encoding} {SIZES_DIFFER}")
    if worked or not os.path.exists(os.path.join(packing.dest, f"{split}.json")):
        if split == "train":
            _write_mean(packing, records, nsamples, height, width)
        _write_index(packing, records, height, width)
    bad = sum(len(record.bad) for record in records)
    megabytes = sum(record.filesize for record in records) / 1e6
    print(
        f"{split}: {nsamples:,} images of {len(packing.items.classes):,} classes in {len(records):,} shards, "
        f"{megabytes:,.1f} MB" + (f"; {bad:,} left out" if bad else "") + ("" if worked else " (packed before)")
    )
    for path in (
        *table_paths(packing.state(""), split),
        packing.state(f"{split}.idx3-ubyte"),
        *map(packing.sums, range(packing.nshards)),
    ):
        if os.path.exists(path):
            os.unlink(path)


def _write_index(packing: Packing, records: list[ShardRecord], height: int, width: int) -> None:
    """Write <split>.json, labels and CRC-32s."""
    items = packing.items
    shards = [Shard(os.path.basename(packing.tar(k)), r.nsamples, r.filesize, r.sha256) for k, r in enumerate(records)]
    split = Split(
        name=items.split,
        root=packing.dest,
        shards=tuple(shards),
        classes=items.classes,
        mean=MEAN if os.path.exists(os.path.join(packing.dest, MEAN)) else "",
        encoding=packing.options.encoding if packing.options.encoding in BARE else "jpeg",
        height=height,
        width=width,
        extra={"wnids": list(items.wnids)} if items.wnids else {},
    )
    labels, crc32 = np.concatenate([np.load(packing.columns(shard)) for shard in range(packing.nshards)], axis=1)
    save_index(split, packing.dest, labels.astype(np.int32), crc32)


def _write_mean(packing: Packing, records: list[ShardRecord], nsamples: int, height: int, width: int) -> None:
    """Write mean.npy, the mean of the pixels before JPEG: float32 (height, width, 3). No file if sizes differ.

    When single shards were packed again, the sums of the others are gone, but then mean.npy is there and still true.
    """
    path = os.path.join(packing.dest, MEAN)
    sums = [packing.sums(record.shard) for record in records if record.nsamples]
    if packing.options.encoding == "copy" and packing.items.mean and nsamples == packing.nsamples:
        with open(packing.items.mean, "rb") as mean:
            write_whole(path, mean.read())
    elif packing.options.encoding == "copy":
        print("no mean.npy: the images were copied without decoding them")
    elif not height or height * width > MEAN_PIXELS:
        print("no mean.npy: the images are not of one size, or very large")
    elif all(map(os.path.exists, sums)):
        total = np.zeros((height, width, 3), np.uint64)
        for file in sums:
            total += np.load(file)
        write_whole(path, npy_bytes((total / nsamples).astype(np.float32)))
