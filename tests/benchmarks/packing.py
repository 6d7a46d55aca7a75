"""Measures packing beside a plain Pillow loop, on photographs it makes: `python tests/benchmarks/packing.py [--json]`.

In: nothing. Out: images/s of the loop and of shards.pack with 1 and 2 processes, what two loops at once gain (two cores
of a shared machine seldom do twice the work of one), MB/s of raw and copy beside plain writing to the same disk, and
resident memory. They are measured in turns, so that a busy machine slows all of them alike.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from shards.format.names import STATE  # noqa: E402
from shards.machine.facts import cpu_and_cores, versions  # noqa: E402
from shards.sources.find import find  # noqa: E402
from shards.sources.items import save_table, without_table  # noqa: E402
from shards.sources.synthetic import write_photographs  # noqa: E402
from shards.write.pool import pack_all  # noqa: E402
from shards.write.shard import Options, Packing, ShardId  # noqa: E402

# The usual photograph of ImageNet: with this quality and spectrum, 107 KB each.
HEIGHT, WIDTH, QUALITY, SPECTRUM = 375, 500, 95, 1.3
SIZE, STORED_QUALITY = 256, 90
PHOTOS = 48  # different ones
COPIES = 100  # of each, as files
# Images per shard: few enough that the one process that packs the last shard alone hardly counts, enough that flushing
# to disk does not either.
SHARD = 200
ROUNDS = 3


def main(argv: list[str] | None = None) -> None:
    """Run all measurements and print them."""
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = options.parse_args(argv).json
    runs: dict[str, list[float]] = defaultdict(list)
    memory = 0
    with tempfile.TemporaryDirectory(prefix="pack-bench-") as folder:
        source = os.path.join(folder, "source")
        train = os.path.join(source, "train", "class")
        files = write_photographs(train, PHOTOS, COPIES, (HEIGHT, WIDTH), QUALITY, SPECTRUM)
        size = sum(map(os.path.getsize, files)) / len(files)
        for turn in range(ROUNDS):
            runs["pillow"].append(pillow_loop(files[: 4 * PHOTOS]))
            runs["pillow_2"].append(pillow_loops_at_once(files[: 4 * PHOTOS], 2))
            for encoding, workers in (("jpeg", 1), ("jpeg", 2), ("raw", 1), ("copy", 1))[: 2 if turn else 4]:
                dest = os.path.join(folder, f"{encoding}-{workers}-{turn}")
                images, megabytes, peak = pack_rate(source, dest, encoding, workers)
                shutil.rmtree(dest)
                memory = max(memory, peak)
                runs[f"{encoding}_{workers}"].append(images if encoding == "jpeg" else megabytes)
            if not turn:
                runs["disk"].append(write_rate(folder, files))
    result = {name: round(statistics.median(values), 1) for name, values in runs.items()}
    report = {
        "images_per_second": result["jpeg_1"],
        "images_per_second_2_processes": result["jpeg_2"],
        "pillow_images_per_second": result["pillow"],
        "speedup_over_pillow": _ratio(runs["jpeg_1"], runs["pillow"]),
        "scaling_2_processes": _ratio(runs["jpeg_2"], runs["jpeg_1"]),
        "scaling_2_pillow_loops": _ratio(runs["pillow_2"], runs["pillow"]),
        "raw_megabytes_per_second": result["raw_1"],
        "copy_megabytes_per_second": result["copy_1"],
        "disk_megabytes_per_second": result["disk"],
        "resident_mebibytes": memory,
        "image_kilobytes": round(size / 1e3, 1),
        "rounds": {name: [round(value, 1) for value in values] for name, values in runs.items()},
        "device": cpu_and_cores(),
        "versions": versions(),
    }
    print(json.dumps(report) if as_json else _text(report))


def pillow_loop(files: list[str]) -> float:
    """Images/s of what a short script does: open, resize with Pillow's default filter, crop, save."""
    from PIL import Image

    start = time.perf_counter()
    for path in files:
        image = Image.open(path).convert("RGB")
        scale = SIZE / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)))
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        image = image.crop((left, top, left + SIZE, top + SIZE))
        image.save(io.BytesIO(), "JPEG", quality=STORED_QUALITY)
    return len(files) / (time.perf_counter() - start)


def pillow_loops_at_once(files: list[str], count: int) -> float:
    """Images/s of several such loops together, each in a process of its own and with nothing shared."""
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(count), context.SimpleQueue()
    processes = [context.Process(target=_loop_beside, args=(files, barrier, rates)) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return sum(rates.get() for _ in processes)


def _loop_beside(files: list[str], barrier, rates) -> None:
    pillow_loop(files[:8])
    barrier.wait()
    rates.put(pillow_loop(files))


def pack_rate(source: str, dest: str, encoding: str, workers: int) -> tuple[float, float, int]:
    """Images/s and MB/s of packing once the processes are warm, and the largest one's resident memory in MiB."""
    os.makedirs(os.path.join(dest, STATE))
    (items,) = find(source)
    options = {"jpeg": Options(), "raw": Options(encoding="raw"), "copy": Options(0, "none", "copy", 0)}[encoding]
    save_table(items, os.path.join(dest, STATE))
    done: list[tuple[float, int, int]] = []  # seconds, images and bytes of each finished shard
    peak = 0

    def on_record(shard, record) -> None:
        nonlocal peak
        done.append((time.perf_counter(), record.nsamples, record.filesize))
        peak = max([peak, *(_resident(child.pid) for child in multiprocessing.active_children())])

    nshards = len(items.table) // SHARD
    packing = Packing(dest, without_table(items), options, nshards)
    pack_all([packing], [ShardId(0, shard) for shard in range(nshards)], workers, None, lambda count: None, on_record)
    # From the moment at which every process has finished a shard: imports and first uses are over.
    warm = workers
    seconds = done[-1][0] - done[warm - 1][0]
    images, size = (sum(entry[column] for entry in done[warm:]) for column in (1, 2))
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return images / seconds, size / seconds / 1e6, max(own, peak)


def write_rate(folder: str, files: list[str]) -> float:
    """MB/s of copying the same files into one file in pieces of a shard's size, each flushed to disk."""
    size, start = 0, time.perf_counter()
    for first in range(0, len(files), SHARD):
        with open(os.path.join(folder, "plain"), "wb") as out:
            for name in files[first : first + SHARD]:
                with open(name, "rb") as file:
                    size += out.write(file.read())
            out.flush()
            os.fsync(out.fileno())
    return size / (time.perf_counter() - start) / 1e6


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the rounds' quotients: within a round the machine was as busy for both."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


def _resident(pid: int) -> int:
    """Peak resident memory of a process, MiB."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return next((int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM")), 0)
    except OSError:  # it has just ended
        return 0


def _text(report: dict) -> str:
    """The report as lines of text."""
    lines = """\
{count:,} JPEGs of {width}x{height}, quality {quality}, {image_kilobytes:.0f} KB -> {size}x{size}, quality {stored}; \
median of {turns} rounds
{device}
  plain Pillow loop           {pillow_images_per_second:8.0f} images/s
  two such loops at once      {scaling_2_pillow_loops:8} times one: what this machine gives
  shards.pack, 1 process      {images_per_second:8.0f} images/s, {speedup_over_pillow} times the loop
  shards.pack, 2 processes    {images_per_second_2_processes:8.0f} images/s, {scaling_2_processes} times one
  --encoding raw, 1 process   {raw_megabytes_per_second:8.0f} MB/s
  --encoding copy, 1 process  {copy_megabytes_per_second:8.0f} MB/s
  plain copying to this disk  {disk_megabytes_per_second:8.0f} MB/s
  resident memory, 1 process  {resident_mebibytes:8} MiB"""
    about = {"count": PHOTOS * COPIES, "width": WIDTH, "height": HEIGHT, "quality": QUALITY, "size": SIZE}
    return lines.format(**report, **about, stored=STORED_QUALITY, turns=ROUNDS)


if __name__ == "__main__":
    main()
