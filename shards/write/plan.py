"""Plans the packing of one split: the order of its images, the number of its shards, what an earlier run has done.

In: the images of a split, DEST and the options. Out: a `Packing`, with its tables in DEST/.pack, and the shards that
are still to be packed. A DEST that was begun with other settings is refused.
"""

import dataclasses
import json
import os
import zlib

import numpy as np

from shards.errors import InputError
from shards.format.split import idx_path
from shards.format.tar import BLOCK
from shards.machine.files import write_whole
from shards.read.images import BadImage
from shards.sources.items import Items, SourceReader, save_table
from shards.sources.mnist import unpack_idx
from shards.write.shard import Options, Packing, ShardId, ShardRecord, encode

MEAN = "mean.npy"

_FORMAT = 1  # of the files in DEST/.pack; another format is not continued
_SHARD_MB = 64  # default size of a shard: about 2,700 photographs of 256 px
_MIN_SHARDS = 16  # so that small data sets are packed in parallel too,
_MIN_IMAGES = 100  # but not with fewer images per shard than this
_SAMPLE = 64  # images that are encoded to estimate the size of all


def prepare(items: Items, dest: str, options: Options) -> Packing:
    """Plan one split: compare the settings with those of an earlier run, write tables in shuffled order.

    Raises:
        InputError: DEST holds this split packed in another way, or other classes, or shards that are not ours.
    """
    if options.encoding == "copy" and items.pixels:
        kept = "planes" if items.planes else "raw"
        raise InputError(
            f"the source holds bare pixels, no image files to copy: use --encoding {kept} --resize 0, or jpeg"
        )
    packing = Packing(dest, items, options, 0)
    settings = {"format": _FORMAT, **dataclasses.asdict(options), "source": items.digest()}
    path = packing.state(f"{items.split}.settings.json")
    earlier = _earlier_settings(path, packing)
    _check_classes(items, dest)
    for name, value in settings.items() if earlier else ():
        if earlier.get(name) != value:
            what = "other source files" if name == "source" else f"{name} {earlier.get(name)}, now {value}"
            raise InputError(
                f"{dest} holds split {items.split!r} packed with {what}; choose another DEST, or remove it"
            )
    for folder in (dest, packing.state("")):  # left by a run that was killed
        for name in os.listdir(folder):
            if name.endswith(".tmp") and name.startswith((f"{items.split}-", f"{items.split}.", MEAN, "bad.txt")):
                os.unlink(os.path.join(folder, name))
    items = dataclasses.replace(items, table=items.table[shuffled(len(items.table), options.seed, items.split)])
    if items.gzipped:
        items = dataclasses.replace(items, files=(unpack_idx(items, packing.state("")),), gzipped=False)
    save_table(items, packing.state(""))
    nshards = earlier["nshards"] if earlier else _count_shards(items, options)
    if not earlier:
        write_whole(path, (json.dumps({**settings, "nshards": nshards}, indent=1) + "\n").encode())
    return Packing(dest, items, options, nshards)


def _earlier_settings(path: str, packing: Packing) -> dict:
    """Settings of an earlier run; empty: there was none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        tars = [n for n in os.listdir(packing.dest) if n.startswith(f"{packing.items.split}-") and n.endswith(".tar")]
        if tars:
            raise InputError(
                f"{packing.dest} holds shards that shards.pack did not begin ({min(tars)}); choose an empty folder"
            ) from None
        return {}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove {packing.dest} and pack again") from None


def _check_classes(items: Items, dest: str) -> None:
    """Splits packed into one DEST by several commands must number the classes alike."""
    for name in os.listdir(dest):
        index = os.path.join(dest, name.replace(".labels.npy", ".json"))
        # Without an index, packing that split was stopped before its end.
        if name.endswith(".labels.npy") and name != f"{items.split}.labels.npy" and os.path.exists(index):
            with open(index, encoding="utf-8") as file:
                other = json.load(file)
            theirs, ours = other.get("wnids") or other.get("classes"), items.wnids or items.classes
            if list(theirs) != list(ours):
                raise InputError(
                    f"{dest} holds split {other['name']!r} with {len(theirs)} classes, which are not the {len(ours)} "
                    f"of this source; choose another DEST"
                )


def shuffled(count: int, seed: int, split: str) -> np.ndarray:
    """A permutation of `count` numbers that depends on seed and split. int64 (count,)

    It sorts the words of the Philox generator, which are the same in every version of numpy.
    """
    key = np.array([seed, zlib.crc32(split.encode())], np.uint64)  # numpy makes floats of a list with 2^63 in it
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def _count_shards(items: Items, options: Options) -> int:
    """Number of shards, which differ by one image at most. `items` are shuffled already."""
    count = len(items.table)
    if options.shard_images:
        return -(-count // options.shard_images)
    reader = SourceReader(items)
    sizes = []
    for row in range(min(_SAMPLE, count)):
        try:
            payload = encode(reader.read(row), options, items).payload
            sizes.append(3 * BLOCK + -(-len(payload) // BLOCK) * BLOCK)
        except BadImage:
            continue
    reader.close()
    total = count * sum(sizes) / max(len(sizes), 1)
    wanted = max(1, round(total / (1e6 * (options.shard_mb or _SHARD_MB))))
    if options.shard_mb is None:
        wanted = max(wanted, min(_MIN_SHARDS, count // _MIN_IMAGES))
    return min(wanted, count)


def remaining(packings: list[Packing]) -> tuple[list[ShardId], dict[ShardId, ShardRecord]]:
    """The shards that are still to be packed, and the records of the finished ones."""
    todo, records = [], {}
    for number, packing in enumerate(packings):
        complete = os.path.exists(os.path.join(packing.dest, f"{packing.items.split}.json"))
        for shard in range(packing.nshards):
            record = _read_record(packing, shard, complete)
            if record is None:
                todo.append(ShardId(number, shard))
            else:
                records[ShardId(number, shard)] = record
    return todo, records


def _read_record(packing: Packing, shard: int, complete: bool) -> ShardRecord | None:
    """The record of a shard that is finished and in place, else None. `complete`: its sums are no longer needed."""
    needed = [idx_path(packing.tar(shard)), packing.columns(shard)]
    try:
        with open(packing.record(shard), encoding="utf-8") as file:
            record = ShardRecord(**json.load(file))
        if record.summed and not complete:
            needed.append(packing.sums(shard))
        whole = os.path.getsize(packing.tar(shard)) == record.filesize and all(map(os.path.exists, needed))
    except (OSError, ValueError, TypeError):
        return None
    return record if whole else None
