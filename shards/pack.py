"""Packs images into shuffled WebDataset shards: `python -m shards.pack SOURCE DEST`, or the same under mpirun.

In: class folders, IDX files, ILSVRC archives or shards. Out: DEST/<split>-000000.tar with .idx, <split>.json and
mean.npy, the same bytes for the same seed whatever the number of processes. Stopped half-way, it carries on.
"""

import argparse
import dataclasses
import io
import json
import os
import sys
import zlib
from typing import TextIO

from shards.command import Parser, run
from shards.errors import InputError
from shards.machine.lock import hold

DESCRIPTION = """\
Pack images into shuffled WebDataset shards, in parallel. SOURCE is one of
  a folder with train/CLASS/* and val/CLASS/* (also Train, training_set, valid, test, ...), or CLASS/* alone;
    images in no class folder need --labels, but for Tiny ImageNet's and Kaggle's copy of ImageNet
  a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or one of the tars
  a folder with IDX files as MNIST has them (train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz and labels)
  a folder of WebDataset shards (<split>-000000.tar)
Archives are read where they lie. The same command, given again after a stop, carries on."""

SHARD_MB = 64  # default size of a shard: some 2,700 photographs of 256 px
MIN_SHARDS = 16  # so that small data sets pack in parallel too, but not below
MIN_IMAGES = 100  # images a shard
SAMPLE = 64  # images packed for a try, to know how large they become
TOO_MANY_BAD = 1000  # unreadable images beyond --max-bad at which packing stops: SOURCE is not what it seems
SHOWN_ENDINGS = 5  # of files that are no images
MEAN = "mean.npy"
FORMAT = 1  # of the files in DEST/.pack; another one is not continued


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m shards.pack", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("source", nargs="?", metavar="SOURCE")
    p.add_argument("dest", nargs="?", metavar="DEST", help="folder for the shards")
    p.add_argument("--resize", type=int, metavar="N", help="pixels (default 256); 0 keeps sizes")
    p.add_argument(
        "--fit",
        choices=("crop", "squash", "none"),
        help="crop: centre square, N x N (default); squash: N x N;\nnone: shorter side N",
    )
    p.add_argument(
        "--encoding",
        choices=("jpeg", "raw", "copy"),
        default="jpeg",
        help="jpeg (default); raw: pixels, read by plain copying;\ncopy: files unchanged",
    )
    p.add_argument("--quality", type=int, metavar="Q", help="of JPEG, 1 to 100 (default 90)")
    p.add_argument("--split", default="", metavar="NAME", help="name of the only split, or pack only this one")
    p.add_argument("--labels", default="", metavar="FILE", help="devkit, or a table (.csv, .txt): image, class")
    p.add_argument("--shard-mb", type=float, metavar="MB", help=f"size of a shard, about (default {SHARD_MB})")
    p.add_argument("--shard-images", type=int, metavar="N", help="the same as a number of images")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores that this job may use)")
    p.add_argument(
        "--max-bad",
        type=int,
        default=0,
        metavar="N",
        help="images that cannot be decoded and are left out\nbefore that is an error (default 0)",
    )
    p.add_argument("--bench", action="store_true", help="measure packing beside a plain Pillow loop; no SOURCE, DEST")
    p.add_argument("--json", action="store_true", help="with --bench: print one JSON object")
    return p


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    arguments = parser().parse_args(argv)
    if arguments.bench:
        if arguments.source:
            raise InputError("--bench makes its own images: leave SOURCE and DEST out")
        from shards.write.bench import bench

        return bench(as_json=arguments.json)
    if not arguments.dest:
        raise InputError("SOURCE and DEST are needed (python -m shards.pack --help)")
    options = checked_options(arguments)
    from shards.write.pool import mpi_world, serve_rank

    comm = mpi_world(arguments.workers is not None)
    if comm is not None and comm.rank > 0:
        jobs = comm.bcast(None)
        if jobs is not None:  # else rank 0 found nothing to do, or an error, and said so
            serve_rank(comm, jobs)
        return 0
    return pack(arguments, options, comm)


def checked_options(arguments):
    """`write.Options` of the command line. Raises InputError for what does not go together."""
    from shards.write.shard import Options

    given = {name: getattr(arguments, name) for name in ("resize", "fit", "quality")}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.encoding == "copy":
        if given:
            raise InputError(f"--encoding copy leaves the files as they are: leave --{next(iter(given))} out")
        return Options(resize=0, fit="none", encoding="copy", quality=0)
    if arguments.encoding == "raw":
        if "quality" in given:
            raise InputError("--quality is for --encoding jpeg")
        given["quality"] = 0
    options = Options(**{**given, "encoding": arguments.encoding})
    if not (options.resize == 0 or 8 <= options.resize <= 4096):
        raise InputError(f"--resize {options.resize}: give 8 to 4096 pixels, or 0 to keep sizes")
    if options.encoding == "raw" and options.fit == "none" and options.resize:
        raise InputError(
            "raw images must have one size: --fit crop or squash, or --resize 0 where they have it already"
        )
    if options.encoding == "jpeg" and not 1 <= options.quality <= 100:
        raise InputError(f"--quality {options.quality}: give 1 to 100")
    for name, least in (("workers", 1), ("shard_images", 1), ("shard_mb", 0.001), ("max_bad", 0), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if arguments.seed >= 1 << 63:
        raise InputError(f"--seed {arguments.seed}: give less than 2^63")
    if arguments.shard_mb is not None and arguments.shard_images is not None:
        raise InputError("give one of --shard-mb and --shard-images")
    return options


def pack(arguments, options, comm) -> int:
    """Pack everything, as the only process or as rank 0 of `comm`."""
    from shards.machine.cores import cores_given
    from shards.machine.progress import Progress
    from shards.sources import find as sources
    from shards.write.pool import WorkerError, pack_all
    from shards.write.shard import STATE, write_error

    released = comm is None  # whether the other ranks have got their jobs, or None
    try:
        found = sources.find(arguments.source, arguments.split, arguments.labels)
        dest = arguments.dest.rstrip("/") or "/"
        _check_apart(arguments.source, found, dest)
        try:
            os.makedirs(os.path.join(dest, STATE), exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {dest}: {error.strerror}") from None
        with _lock(dest):
            try:
                jobs = [prepare(items, dest, arguments, options) for items in found]
            except OSError as error:
                raise write_error(dest, error) from None
            tasks, records = remaining(jobs)
            total, left = sum(j.nsamples for j in jobs), sum(_count(jobs, task) for task in tasks)
            if tasks:
                _say(jobs, tasks, total - left)
                light = [dataclasses.replace(job, items=_light(job)) for job in jobs]
                released = True  # pack_all does it, and whatever happens then tells them to stop
                what = f"packing {' and '.join(dict.fromkeys(jobs[number].items.split for number, _ in tasks))}"
                progress = Progress(total, what=what, done=total - left)

                bad = 0

                def on_record(task, record):
                    nonlocal bad
                    records[task] = record
                    bad += len(record["bad"])
                    if bad > arguments.max_bad + TOO_MANY_BAD:
                        raise InputError(
                            f"{bad:,} images cannot be decoded, {_first_bad(records)}; is this the source?"
                        )

                try:
                    pack_all(light, tasks, arguments.workers or cores_given().count, comm, progress.add, on_record)
                finally:
                    progress.close()
            try:
                finish(jobs, records, arguments.max_bad, bool(tasks))
            except OSError as error:
                raise write_error(dest, error) from None
        return 0
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if not released:
            comm.bcast(None)


def _light(job):
    from shards.sources.items import without_table

    return without_table(job.items)


def _count(jobs, task) -> int:
    from shards.write.shard import bounds

    job = jobs[task[0]]
    first, last = bounds(job.nsamples, job.nshards, task[1])
    return last - first


def _check_apart(source: str, found, dest: str) -> None:
    """DEST among the class folders would be taken for a class when the command is given again."""
    there = os.path.realpath(dest)
    if os.path.realpath(source) == there:
        raise InputError("SOURCE and DEST are the same folder")
    for path in (path for items in found for path in items.files if os.path.isdir(path)):
        if os.path.commonpath([os.path.realpath(path), there]) == os.path.realpath(path):
            raise InputError(f"DEST {dest} lies among the class folders of {path}; choose a folder outside it")


def _lock(dest: str) -> TextIO:
    """Only one pack at a time in DEST, until the file that this returns is closed, or this process ends."""
    try:
        return hold(os.path.join(dest, ".pack", "lock"), dest, "DEST")
    except OSError as error:
        raise InputError(f"cannot write to {dest}: {error.strerror}") from None


def prepare(items, dest: str, arguments, options):
    """The job of one split: settings compared with those of an earlier run, tables written in shuffled order."""
    from shards.machine.files import write_whole
    from shards.sources.find import unpack_idx
    from shards.sources.items import save_table
    from shards.write.shard import Job

    if options.encoding == "copy" and items.pixels:
        raise InputError("the source holds bare pixels, no image files to copy: use --encoding raw --resize 0, or jpeg")
    settings = {
        "format": FORMAT,
        **dataclasses.asdict(options),
        "seed": arguments.seed,
        "shard_mb": arguments.shard_mb,
        "shard_images": arguments.shard_images,
        "source": items.digest(),
    }
    job = Job(dest, items, options, 0)
    path = job.state(f"{items.split}.settings.json")
    earlier = _earlier_settings(path, job)
    _check_classes(items, dest)
    if earlier:
        for name, value in settings.items():
            if earlier.get(name) != value:
                what = "other source files" if name == "source" else f"{name} {earlier.get(name)}, now {value}"
                raise InputError(
                    f"{dest} holds split {items.split!r} packed with {what}; choose another DEST, or remove it"
                )
        nshards = earlier["nshards"]
    for folder in (dest, job.state("")):  # left by a pack that was killed
        for name in os.listdir(folder):
            if name.endswith(".tmp") and name.startswith((f"{items.split}-", f"{items.split}.", MEAN, "bad.txt")):
                os.unlink(os.path.join(folder, name))
    order = shuffled(len(items.table), arguments.seed, items.split)
    items = dataclasses.replace(items, table=items.table[order])
    if items.gzipped:
        items = dataclasses.replace(items, files=(unpack_idx(items, job.state("")),), gzipped=False)
    save_table(items, job.state(""))
    job = dataclasses.replace(job, items=items)
    if not earlier:
        nshards = count_shards(job, arguments.shard_mb, arguments.shard_images)
        write_whole(path, (json.dumps({**settings, "nshards": nshards}, indent=1) + "\n").encode())
    return dataclasses.replace(job, nshards=nshards)


def _check_classes(items, dest: str) -> None:
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


def _earlier_settings(path: str, job) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        strange = [n for n in os.listdir(job.dest) if n.startswith(f"{job.items.split}-") and n.endswith(".tar")]
        if strange:
            raise InputError(
                f"{job.dest} holds shards that shards.pack did not begin ({min(strange)}); choose an empty folder"
            ) from None
        return {}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); remove {job.dest} and pack again") from None


def shuffled(count: int, seed: int, split: str):
    """A permutation by (seed, split): the order of Philox's words, which no numpy version may change."""
    import numpy as np

    key = np.array([seed, zlib.crc32(split.encode())], np.uint64)  # a list with a number from 2^63 on turns to float
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def count_shards(job, shard_mb: float | None, shard_images: int | None) -> int:
    """Number of shards, which differ by one image at most."""
    if shard_images:
        return -(-job.nsamples // shard_images)
    from shards.read.images import BadImage
    from shards.sources.items import Reader
    from shards.write.shard import BLOCK, encode

    reader = Reader(job.items)
    sizes = []
    for row in range(min(SAMPLE, job.nsamples)):  # the order is random already
        try:
            payload = encode(reader.read(row), job.options, job.items.pixels).payload
            sizes.append(3 * BLOCK + -(-len(payload) // BLOCK) * BLOCK)
        except BadImage:
            continue
    reader.close()
    total = job.nsamples * sum(sizes) / max(len(sizes), 1)
    wanted = max(1, round(total / (1e6 * (shard_mb or SHARD_MB))))
    if shard_mb is None:
        wanted = max(wanted, min(MIN_SHARDS, job.nsamples // MIN_IMAGES))
    return min(wanted, job.nsamples)


def remaining(jobs) -> tuple[list[tuple[int, int]], dict]:
    """Tasks (job, shard) still to be done, and the records of the finished ones."""
    tasks, records = [], {}
    for number, job in enumerate(jobs):
        complete = os.path.exists(os.path.join(job.dest, f"{job.items.split}.json"))
        for shard in range(job.nshards):
            record = _read_record(job, shard, complete)
            if record is None:
                tasks.append((number, shard))
            else:
                records[number, shard] = record
    return tasks, records


def _read_record(job, shard: int, complete: bool) -> dict | None:
    """Record of a shard that is finished and in place, else None. `complete`: its sums are no longer needed."""
    from shards.format.split import idx_path

    needed = [idx_path(job.tar(shard)), job.columns(shard)]
    try:
        with open(job.record(shard), encoding="utf-8") as file:
            record = json.load(file)
        if record["summed"] and not complete:
            needed.append(job.sums(shard))
        whole = os.path.getsize(job.tar(shard)) == record["filesize"] and all(map(os.path.exists, needed))
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None


def finish(jobs, records: dict, max_bad: int, worked: bool) -> None:
    """Write mean.npy and <split>.json from the shards' records, and say what was packed.

    Raises:
        InputError: more than `max_bad` images were left out; nothing is written then, and no shard lost.
    """
    bad = [
        (job.items.split, *entry)
        for n, job in enumerate(jobs)
        for k in range(job.nshards)
        for entry in records[n, k]["bad"]
    ]
    if bad:
        from shards.machine.files import write_whole

        path = jobs[0].state("bad.txt")
        text = "".join(f"{split}\t{name}\t{reason}\n" for split, name, reason in bad)
        write_whole(path, text.encode("utf-8", "surrogateescape"))
        if len(bad) > max_bad:
            raise InputError(
                f"{len(bad):,} images cannot be decoded, {_first_bad(records)}; all are listed in {path}. The rest is "
                f"packed: the same command with --max-bad {len(bad)} leaves them out"
            )
        print(f"left out {len(bad):,} images that cannot be decoded: {path}")
    for number, job in enumerate(jobs):
        finish_split(job, [records[number, shard] for shard in range(job.nshards)], worked)


def _first_bad(records: dict) -> str:
    name, reason = next(entry for record in records.values() for entry in record["bad"])
    return f"the first is {name}: {reason}"


def finish_split(job, records: list[dict], worked: bool) -> None:
    """Write the index of the split, for train mean.npy, and remove what only an unfinished pack needs."""
    import numpy as np

    from shards.format.split import Shard, Split, save_index
    from shards.sources.items import table_paths
    from shards.write.shard import SIZES_DIFFER

    split = job.items.split
    nsamples = sum(record["nsamples"] for record in records)
    if not nsamples:
        raise InputError(f"no image of split {split!r} can be decoded")
    sizes = {tuple(record["size"]) for record in records if record["nsamples"]}
    height, width = sizes.pop() if len(sizes) == 1 else (0, 0)
    if job.options.encoding == "raw" and not height:
        raise InputError(SIZES_DIFFER)
    bad = sum(len(record["bad"]) for record in records)
    if worked or not os.path.exists(os.path.join(job.dest, f"{split}.json")):
        if split == "train":
            write_mean(job, records, nsamples, height, width)
        columns = [np.load(job.columns(shard)) for shard in range(job.nshards)]
        save_index(
            Split(
                name=split,
                root=job.dest,
                shards=tuple(
                    Shard(os.path.basename(job.tar(k)), r["nsamples"], r["filesize"], r["sha256"])
                    for k, r in enumerate(records)
                ),
                classes=job.items.classes,
                mean=MEAN if os.path.exists(os.path.join(job.dest, MEAN)) else "",
                encoding="raw" if job.options.encoding == "raw" else "jpeg",
                height=height,
                width=width,
                extra={"wnids": list(job.items.wnids)} if job.items.wnids else {},
            ),
            job.dest,
            np.concatenate([labels for labels, _ in columns]).astype(np.int32),
            np.concatenate([crc32 for _, crc32 in columns]),
        )
    megabytes = sum(record["filesize"] for record in records) / 1e6
    print(
        f"{split}: {nsamples:,} images of {len(job.items.classes):,} classes in {len(records):,} shards, "
        f"{megabytes:,.1f} MB" + (f"; {bad:,} left out" if bad else "") + ("" if worked else " (packed before)")
    )
    scratch = [*table_paths(job.state(""), split), job.state(f"{split}.idx3-ubyte"), *map(job.sums, range(job.nshards))]
    for path in scratch:
        if os.path.exists(path):
            os.unlink(path)


def write_mean(job, records: list[dict], nsamples: int, height: int, width: int) -> None:
    """Write mean.npy, the mean of the pixels before JPEG: float32 (height, width, 3). None where sizes differ.

    After a repair of single shards the sums of the others are gone, but then the mean stands there and stays true.
    """
    import numpy as np

    from shards.machine.files import write_whole
    from shards.write.shard import MEAN_PIXELS

    sums = [job.sums(shard) for shard, record in enumerate(records) if record["nsamples"]]
    if job.options.encoding == "copy" and job.items.mean and sum(r["nsamples"] for r in records) == job.nsamples:
        with open(job.items.mean, "rb") as mean:
            write_whole(os.path.join(job.dest, MEAN), mean.read())
    elif job.options.encoding == "copy":
        print("no mean.npy: the images were copied without decoding them")
    elif not height or height * width > MEAN_PIXELS:
        print("no mean.npy: the images are not of one size, or very large")
    elif all(map(os.path.exists, sums)):
        total = np.zeros((height, width, 3), np.uint64)
        for path in sums:
            total += np.load(path)
        file = io.BytesIO()
        np.save(file, (total / nsamples).astype(np.float32))
        write_whole(os.path.join(job.dest, MEAN), file.getvalue())


def _say(jobs, tasks, done: int) -> None:
    import numpy as np

    for job in jobs:
        items = job.items
        print(f"{items.split}: {job.nsamples:,} images of {len(items.classes):,} classes for {job.nshards:,} shards")
        if items.left_out:
            most = sorted(items.left_out, key=items.left_out.get, reverse=True)[:SHOWN_ENDINGS]
            kinds = ", ".join(f"{items.left_out[ending]:,} {ending}" for ending in most)
            print(f"  note: {sum(items.left_out.values()):,} files are no images by their names: {kinds}")
        empty = len(items.classes) - len(np.unique(items.table["label"]))
        if empty:
            print(
                f"  note: {empty:,} classes have no image"
                + ("" if 0 in items.table["label"] else "; labels count from 0")
            )
    if done:
        print(f"carrying on: {done:,} images are packed already, {len(tasks):,} shards remain")
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
