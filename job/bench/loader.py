"""Speed of the loader beside bare decoding of the same images: the subject `loader` of job.bench.

In: a folder of shards, or none: then photograph-like images are made. Out: images/s in all and per core, start-up time
and memory. Both are measured in turns, so that a busy machine slows them alike.
"""

import contextlib
import io
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from shards import ROOT
from shards.machine.cores import cores_given

DESCRIPTION = (
    "Images/s of reading, decoding and cropping, as training does it, into the memory from which the GPU copies. "
    "Without --data, 2,048 synthetic photographs of 256x256 are packed first (1/f noise, JPEG quality 90, about 27 KB "
    "each)."
)

_PHOTOS = 256  # different ones
_IMAGES = 2048
_SIDE, _QUALITY = 256, 90
# Amplitude of natural images falls as 1/f; 1.4 instead of 1 makes up for their smooth parts, so that the JPEGs are as
# large as those of photographs.
_SPECTRUM = 1.4
_BARE = 512  # images that are decoded alone


def add_options(parser) -> None:
    """The command line of this subject."""
    parser.add_argument("--data", default="", metavar="DIR", help="folder of shards; empty: synthetic ones")
    parser.add_argument("--split", default="train", metavar="NAME")
    parser.add_argument("--workers", type=int, default=-1, metavar="W", help="reader processes; -1: by the cores given")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="images a batch")
    parser.add_argument("--crop", type=int, default=227, metavar="PX")
    parser.add_argument("--encoding", choices=("jpeg", "raw"), default="jpeg", help="of the synthetic shards")
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of them; the median counts")


def measure(arguments) -> dict:
    """Measure, and return the fields of the JSON object."""
    from job.batches.cores import default_workers
    from shards.format.split import load_split
    from shards.machine.progress import Line

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
            if split.encoding != "raw":
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
        "device": cpu_name(),
        "versions": versions(),
    }
    if bare:
        result["decoder"] = bare[0][0]
        result["decode_images_per_second"] = statistics.median(rate for _, rate in bare)
        result["share_of_decoding"] = result["images_per_second_per_core"] / result["decode_images_per_second"]
    return result


def text(result: dict) -> str:
    """The same for a reader."""
    lines = [
        f"data               {result['data']}: {result['samples']:,} images of {result['bytes_per_image']:,} bytes",
        f"loader             {result['images_per_second']:,.0f} images/s with {result['workers']} workers"
        f" ({result['images_per_second_per_core']:,.0f} a core, {result['images_per_cpu_second']:,.0f} a CPU second)",
    ]
    if "decoder" in result:
        lines.append(
            f"{result['decoder']:<18} {result['decode_images_per_second']:,.0f} images/s on one core, nothing but "
            f"decoding: the loader reaches {result['share_of_decoding']:.0%} of it a core"
        )
    lines += [
        f"start              {result['start_seconds']:.2f} s to the first batch",
        f"memory             {result['slot_bytes'] / 2**20:,.0f} MiB of slots, "
        f"{result['worker_bytes'] / 2**20:,.0f} MiB in all workers",
        f"CPU                {result['device']}",
    ]
    return "\n".join(lines)


def loader_run(split, workers: int, batch: int, crop: int, seconds: float) -> dict:
    """Images/s of a Loader in steady state, over at least `seconds`."""
    import psutil

    from job.batches.loader import Loader

    began = time.perf_counter()
    with Loader(split, rank=0, world_size=1, global_batch=batch, crop=crop, workers=workers) as loader:
        next(loader)
        start = time.perf_counter() - began
        # What was read ahead comes for nothing: only behind it each batch takes as long as it takes to read one. And a
        # first pass over the data fills the page cache.
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


def cpu_seconds(processes) -> float:
    """CPU time that processes have used so far."""
    return sum(p.cpu_times().user + p.cpu_times().system for p in processes)


def read_images(split, count: int) -> list[bytes]:
    """The bytes of so many images of a split."""
    from shards.read.reader import DamagedSample, ShardReader

    images = []
    with ShardReader(split) as reader:
        for number, shard in enumerate(split.shards):
            for sample in range(min(shard.nsamples, count - len(images))):
                with contextlib.suppress(DamagedSample):
                    images.append(bytes(reader.read(number, sample)))
    return images


def bare_decode(images: list[bytes], seconds: float) -> tuple[str, float]:
    """Name of the decoder, and its images/s on one core: bytes in memory to pixels in a buffer, and nothing else."""
    import numpy as np

    from shards.read.images import decode, simplejpeg

    sizes = []
    if simplejpeg is not None:
        for data in images:
            with contextlib.suppress(ValueError):  # no JPEG
                sizes.append(simplejpeg.decode_jpeg_header(data)[:2])
    if len(sizes) == len(images):
        name = "simplejpeg"
        buffer = np.empty(max(height * width * 3 for height, width in sizes), np.uint8)

        def action(data):
            simplejpeg.decode_jpeg(data, "RGB", buffer=buffer)
    else:
        name, action = "Pillow" if simplejpeg is None else "simplejpeg, Pillow", decode

    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < seconds:
        for data in images[:64]:
            with contextlib.suppress(ValueError):  # damaged
                action(data)
        count += len(images[:64])
        images = images[64:] + images[:64]
    return name, count / elapsed


def photograph(seed: int, side: int = _SIDE):
    """An image with the spectrum of a photograph and little colour, uint8 (side, side, 3)."""
    import numpy as np

    random = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)
    amplitude = np.maximum(np.hypot(fy, fx), 1 / side) ** -_SPECTRUM
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(amplitude * np.exp(2j * np.pi * random.random(amplitude.shape)), (side, side))
        planes.append(plane / plane.std())
    grey = 128 + 50 * planes[0]
    return np.clip(np.stack([grey + 12 * planes[1], grey, grey + 12 * planes[2]], -1), 0, 255).astype(np.uint8)


@contextlib.contextmanager
def synthetic_shards(encoding: str) -> Iterator[str]:
    """A temporary folder of shards, as shards.pack makes them of `photograph`s; gone afterwards."""
    from PIL import Image

    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder:
        source, dest = os.path.join(folder, "images"), os.path.join(folder, "shards")
        os.makedirs(os.path.join(source, "photograph"))
        for number in range(_PHOTOS):
            file = io.BytesIO()
            Image.fromarray(photograph(number)).save(file, "JPEG", quality=_QUALITY)
            for copy in range(_IMAGES // _PHOTOS):
                with open(os.path.join(source, "photograph", f"{number}-{copy}.jpg"), "wb") as target:
                    target.write(file.getvalue())
        kept = "raw" if encoding == "raw" else "copy"
        command = [sys.executable, "-m", "shards.pack", source, dest, "--split", "train", "--encoding", kept]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        yield dest


def cpu_name() -> str:
    """Model of the processor, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {cores_given().count} cores"


def versions() -> dict[str, str]:
    import importlib.metadata

    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "pillow", "simplejpeg"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
