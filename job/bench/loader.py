"""Speed of the loader beside bare decoding of the same images: the subject `loader` of job.bench.

In: a folder of shards, or none: then photograph-like images are made. Out: images/s in all and per core, start-up time
and memory. Both are measured in turns, so that a busy machine slows them alike.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil

from job.batches.workers import default_workers
from shards import ROOT
from shards.format.split import BARE, Split, load_split
from shards.machine.facts import cpu_and_cores, versions
from shards.machine.progress import Line
from shards.read.images import decode, simplejpeg
from shards.read.reader import DamagedSample, ShardReader
from shards.sources.synthetic import write_photographs

_PHOTOS = 256  # different ones
_IMAGES = 2048
_SIDE, _QUALITY = 256, 90
_BARE = 512  # images that are decoded alone


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the fields of the JSON object: rates in images/s, times in seconds, sizes in bytes."""

    workers = default_workers() if arguments.workers < 0 else arguments.workers
    with contextlib.ExitStack() as stack:
        data = arguments.data or stack.enter_context(synthetic_shards(arguments.encoding))
        split = load_split(data, arguments.split)
        images = read_images(split, _BARE)
        rates, bare, cpu = [], [], []
        line = Line(sys.stderr)
        for number in range(1, arguments.rounds + 1):
            before = f"; the one before: {rates[-1]:,.0f} images/s" if rates else ""
            line.show(f"loader: round {number} of {arguments.rounds}{before}")
            run = loader_run(split, workers, arguments.batch, arguments.crop, arguments.seconds)
            rates.append(run["images_per_second"])
            cpu.append(run["images_per_cpu_second"])
            if split.encoding not in BARE:
                bare.append(bare_decode(images, arguments.seconds / 2))
        line.clear()
    rate, processes = statistics.median(rates), max(workers, 1)
    result = {
        "subject": "loader",
        "images_per_second": rate,
        "images_per_second_per_core": rate / processes,
        "images_per_cpu_second": statistics.median(cpu),
        "rounds": rates,
        "workers": workers,
        "batch": arguments.batch,
        "crop": arguments.crop,
        "data": data if arguments.data else f"synthetic, {arguments.encoding}",
        "samples": split.nsamples,
        "bytes_per_image": round(statistics.mean(map(len, images))),
        "start_seconds": run["start_seconds"],
        "slot_bytes": run["slot_bytes"],
        "worker_bytes": run["worker_bytes"],
        "device": cpu_and_cores(),
        "versions": versions(),
    }
    if bare:
        result["decoder"] = bare[0][0]
        result["decode_images_per_second"] = statistics.median(rate for _, rate in bare)
        result["share_of_decoding"] = result["images_per_second_per_core"] / result["decode_images_per_second"]
    return result


def text(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = [
        f"data               {result['data']}: {result['samples']:,} images of {result['bytes_per_image']:,} bytes",
        f"loader             {result['images_per_second']:,.0f} images/s with {result['workers']} workers"
        f" ({result['images_per_second_per_core']:,.0f} per core, "
        f"{result['images_per_cpu_second']:,.0f} per CPU second)",
    ]
    if "decoder" in result:
        lines.append(
            f"{result['decoder']:<18} {result['decode_images_per_second']:,.0f} images/s on one core, nothing but "
            f"decoding: per core, the loader reaches {result['share_of_decoding']:.0%} of it"
        )
    lines += [
        f"start              {result['start_seconds']:.2f} s to the first batch",
        f"memory             {result['slot_bytes'] / 2**20:,.0f} MiB of slots, "
        f"{result['worker_bytes'] / 2**20:,.0f} MiB in all workers",
        f"CPU                {result['device']}",
    ]
    return "\n".join(lines)


def loader_run(split: Split, workers: int, batch: int, crop: int, seconds: float) -> dict[str, float]:
    """Images/s of a Loader in steady state, over at least `seconds`."""
    from job.batches.loader import Loader  # here: job.doctor uses this module where torch is missing or broken

    began = time.perf_counter()
    with Loader(split, rank=0, world_size=1, global_batch=batch, crop=crop, workers=workers) as loader:
        next(loader)
        start = time.perf_counter() - began
        # Batches that were read ahead cost nothing: only after them does each take as long as reading one. A first pass
        # over the data also fills the page cache.
        warm = time.perf_counter()
        for _ in range(max(8, min(split.nsamples // batch, 64))):
            next(loader)
            if time.perf_counter() - warm > 10:
                break
        workers_of_it = [psutil.Process(pid) for pid in loader.pids]
        processes = [psutil.Process(), *workers_of_it]
        cpu = -cpu_seconds(processes)
        began, count = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - began) < seconds:
            next(loader)
            count += batch
        cpu += cpu_seconds(processes)
        return {
            "images_per_second": count / elapsed,
            "images_per_cpu_second": count / cpu,
            "start_seconds": start,
            "slot_bytes": loader.nbytes,
            # The slots are counted already.
            "worker_bytes": sum(p.memory_info().rss - p.memory_info().shared for p in workers_of_it),
        }


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """CPU time that processes have used so far."""
    return sum(p.cpu_times().user + p.cpu_times().system for p in processes)


def read_images(split: Split, count: int) -> list[bytes]:
    """The files of the first `count` images of a split, without damaged ones."""

    images = []
    with ShardReader(split) as reader:
        for number, shard in enumerate(split.shards):
            for sample in range(min(shard.nsamples, count - len(images))):
                with contextlib.suppress(DamagedSample):
                    images.append(bytes(reader.read(number, sample)))
    return images


def decode_rate(decode: Callable[[bytes], object], images: list[bytes], seconds: float) -> float:
    """Images/s that `decode` reaches on one core, over the images again and again."""
    began, count = time.perf_counter(), 0
    for data in itertools.cycle(images):
        with contextlib.suppress(ValueError):  # damaged
            decode(data)
        count += 1
        elapsed = time.perf_counter() - began
        if elapsed >= seconds:
            return count / elapsed
    raise ValueError("no images to decode")


def bare_decode(images: list[bytes], seconds: float) -> tuple[str, float]:
    """Name of the decoder, and its images/s on one core: bytes in memory to pixels in a buffer, and nothing else."""
    sizes = []
    if simplejpeg is not None:
        for data in images:
            with contextlib.suppress(ValueError):  # not a JPEG
                sizes.append(simplejpeg.decode_jpeg_header(data)[:2])
    if len(sizes) < len(images):
        return "Pillow" if simplejpeg is None else "simplejpeg, Pillow", decode_rate(decode, images, seconds)
    buffer = np.empty(max(height * width * 3 for height, width in sizes), np.uint8)
    return "simplejpeg", decode_rate(lambda data: simplejpeg.decode_jpeg(data, "RGB", buffer=buffer), images, seconds)


@contextlib.contextmanager
def synthetic_shards(encoding: str) -> Iterator[str]:
    """A temporary folder of shards, as shards.pack makes them of synthetic photographs; gone afterwards."""

    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        source, dest = os.path.join(folder, "images"), os.path.join(folder, "shards")
        write_photographs(os.path.join(source, "photograph"), _PHOTOS, _IMAGES // _PHOTOS, (_SIDE, _SIDE), _QUALITY)
        kept = encoding if encoding in BARE else "copy"
        command = [sys.executable, "-m", "shards.pack", source, dest, "--split", "train", "--encoding", kept]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        yield dest
