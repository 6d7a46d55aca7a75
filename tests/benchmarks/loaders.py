"""Our loader beside bare decoding, WebDataset's own pipeline and NVIDIA DALI on CPU, in turns on the same shards.

In: a folder of shards with .jpg and .cls members, or none (synthetic photographs). Out: a table of medians and of ours
relative to each. Installs nothing: what is missing is left out (pip install nvidia-dali-cuda120).

    python tests/benchmarks/loaders.py [--data DIR] [--rounds 5] [--seconds 4]
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time

import psutil

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)

from job.bench import loader as bench_loader  # noqa: E402
from shards.format.split import load_split  # noqa: E402
from shards.machine.facts import cpu_and_cores  # noqa: E402

BATCH, CROP = 256, 227


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--data", default="", help="folder of shards; empty: synthetic ones")
    options.add_argument("--split", default="train")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options.add_argument("--json", action="store_true")
    options.add_argument("--one", help=argparse.SUPPRESS)  # measure one contender in this process
    options.add_argument("--workers", type=int, default=1, help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        split = load_split(arguments.data, arguments.split)
        print(*CONTENDERS[arguments.one](split, arguments.workers, arguments.seconds))
        return
    with contextlib.ExitStack() as stack:
        data = arguments.data or stack.enter_context(bench_loader.synthetic_shards("jpeg"))
        rows = [(name, workers) for name in ("simplejpeg", "ours", "webdataset", "dali") for workers in (1, 2)]
        rows.remove(("simplejpeg", 2))
        if not installed("nvidia.dali"):
            print("NVIDIA DALI is not installed: left out", file=sys.stderr)
            rows = [row for row in rows if row[0] != "dali"]
        rates = {row: [] for row in rows}
        for _ in range(arguments.rounds):
            for name, workers in rows:
                rates[name, workers].append(in_new_process(name, workers, data, arguments))
    if arguments.json:
        print(json.dumps({f"{name} {workers}": values for (name, workers), values in rates.items()}))
    walls = {row: [wall for wall, _ in values] for row, values in rates.items()}
    median = {row: statistics.median(values) for row, values in walls.items()}
    print(f"{'':12} workers   images/s    lowest-highest   a CPU second   ours with as many workers")
    for (name, workers), rate in median.items():
        wall, cpu = walls[name, workers], statistics.median(cpu for _, cpu in rates[name, workers])
        print(
            f"{name:12} {workers:7} {rate:10,.0f} {min(wall):9,.0f}-{max(wall):<7,.0f} {cpu:13,.0f} "
            f"  {median['ours', workers] / rate:.2f}x"
        )
    print(f"ours, 2 workers to 1: {median['ours', 2] / median['ours', 1]:.2f}x   ({cpu_and_cores()})")


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False


def in_new_process(name: str, workers: int, data: str, arguments) -> tuple[float, float]:
    """Images a second, and a CPU second, of one contender in a new process: none runs in what another left behind."""
    command = [sys.executable, os.path.abspath(__file__), "--one", name, "--workers", str(workers)]
    command += ["--data", data, "--split", arguments.split, "--seconds", str(arguments.seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, timeout=600)
    wall, cpu = done.stdout.split()[-2:]
    return float(wall), float(cpu)


def steady(batches, images: int, seconds: float) -> tuple[float, float]:
    """Images a second, and a second of CPU time of all processes, of an endless iterator of batches.

    Counted behind a first pass over the data, which fills the page cache.
    """
    for _ in range(max(8, images // BATCH)):
        next(batches)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    cpu = -bench_loader.cpu_seconds(processes)
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        next(batches)
        count += BATCH
    cpu += bench_loader.cpu_seconds(processes)
    return count / elapsed, count / cpu


def simplejpeg(split, workers: int, seconds: float) -> tuple[float, float]:
    images, before = bench_loader.read_images(split, 512), time.process_time()
    _, rate = bench_loader.bare_decode(images, seconds)
    return rate, rate * seconds / (time.process_time() - before)


def ours(split, workers: int, seconds: float) -> tuple[float, float]:
    run = bench_loader.loader_run(split, workers, BATCH, CROP, seconds)
    return run["images_per_second"], run["images_per_cpu_second"]


def webdataset(split, workers: int, seconds: float) -> tuple[float, float]:
    """`WebDataset(...).shuffle(1000).decode("pil").map(crop).batched(256)` through WebLoader."""
    import numpy as np
    import webdataset as wds

    random = np.random.default_rng(0)

    def crop(sample):
        image = np.asarray(sample["jpg"].convert("RGB"))
        top = random.integers(image.shape[0] - CROP + 1)
        left = random.integers(image.shape[1] - CROP + 1)
        return image[top : top + CROP, left : left + CROP], sample["cls"]

    urls = [split.path(shard.url) for shard in split.shards]
    dataset = wds.WebDataset(urls, shardshuffle=100, nodesplitter=wds.split_by_node).repeat()
    dataset = dataset.shuffle(1000).decode("pil").map(crop).batched(BATCH)
    return steady(iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers)), split.nsamples, seconds)


def dali(split, workers: int, seconds: float) -> tuple[float, float]:
    """Webdataset reader, decoder, random crop, mirror, on CPU alone."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)
    def pipeline():
        encoded, label = fn.readers.webdataset(
            paths=[split.path(shard.url) for shard in split.shards],
            index_paths=[split.idx_path(shard) for shard in split.shards],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=1000,
        )
        images = fn.decoders.image(encoded, device="cpu")
        place = dict(crop_pos_x=fn.random.uniform(range=(0, 1)), crop_pos_y=fn.random.uniform(range=(0, 1)))
        images = fn.crop(images, crop=(CROP, CROP), **place)
        return fn.flip(images, horizontal=fn.random.coin_flip()), label

    running = pipeline()
    running.build()

    def batches():
        while True:
            images, labels = running.run()
            yield images.as_array(), labels

    return steady(batches(), split.nsamples, seconds)


CONTENDERS = {function.__name__: function for function in (simplejpeg, ours, webdataset, dali)}

if __name__ == "__main__":
    main()
