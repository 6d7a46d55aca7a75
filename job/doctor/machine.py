"""Checks of a node: decoder, cores, memory, caches, limits, network links, Slurm, and how fast its shards are read.

In: the machine, the launcher's environment, a split. Out: findings.
"""

import io
import os
import resource
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from job.doctor.findings import Finding, ok, slow, wrong
from job.doctor.libraries import installed_version
from job.ranks import mpi

if TYPE_CHECKING:
    from shards.format.split import Split

DECODE_SECONDS = 0.3
READ_SECONDS = 2.0
READ_BYTES = 256 << 20
SHM_BYTES = 1 << 30  # MPI and NCCL need some MB per pair of ranks; a container's default of 64 MiB is too little
MEMORY_BYTES = 4 << 30  # that a rank needs at least: torch 1 to 2 GB, batches 0.4 GB, 60 MB per reader
FILES = 1024  # open shards, pipes and sockets of a rank
INFINIBAND = "/sys/class/infiniband"
GIB = 1 << 30


def check_decoder() -> tuple[Finding, float]:
    """How fast JPEGs are decoded; the finding, and images/s per core of the fastest decoder here."""
    import numpy as np
    from PIL import Image, features

    from job.bench.loader import decode_rate
    from shards.sources.synthetic import photograph

    file = io.BytesIO()
    Image.fromarray(photograph(0, 256, 256)).save(file, "JPEG", quality=90)

    def rate_of(decode: Callable[[bytes], object]) -> float:
        return decode_rate(decode, [file.getvalue()], DECODE_SECONDS)

    pillow = rate_of(lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    turbo = features.version("libjpeg_turbo") or "without libjpeg-turbo"
    text = f"Pillow {installed_version('pillow')} ({turbo}) {pillow:,.0f}"
    try:
        import simplejpeg
    except ImportError as error:
        text += f" images/s per core (256 x 256); no simplejpeg ({error})"
        advice = "pip install simplejpeg decodes about twice as fast"
        return slow("decoder", text, advice, same="Pillow", value=pillow), pillow
    rate = rate_of(lambda data: simplejpeg.decode_jpeg(data, "RGB"))
    text = f"simplejpeg {simplejpeg.__version__} {rate:,.0f} images/s per core (256 x 256); {text}"
    from shards.read import fastjpeg, images

    if fastjpeg.missing():
        text += "; no shards/read/jpeg.c"
        return slow("decoder", text, images.slow_decoder(), same="simplejpeg", value=rate), rate
    rate = rate_of(images.decode)
    return ok("decoder", f"shards/read/jpeg.c {rate:,.0f}, {text}", same="shards/read/jpeg.c", value=rate), rate


def check_cores(ranks: int = 1) -> list[Finding]:
    """Cores that this process may use, and OMP_NUM_THREADS; `ranks`: on this node, which share its cores."""
    from shards.machine.cores import cgroup_quota, cores_given

    affinity, machine, given = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cores_given().count
    quota = cgroup_quota()
    text = f"{given} of {machine} given (affinity {affinity}, cgroup {'no limit' if quota is None else f'{quota:g}'})"
    cores = ok("cores", text, same=str(given), value=float(given))
    if given == 1 and machine > ranks:
        cores = slow("cores", text, "in a job: --cpus-per-task; with mpirun by hand: --bind-to none")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > given:
        text = f"OMP_NUM_THREADS={threads}, but {given} core(s) are given"
        return [cores, slow("threads", text, f"export OMP_NUM_THREADS={given}, or unset it")]
    return [cores, ok("threads", f"OMP_NUM_THREADS {threads or 'not set'}")]


def check_memory(local_ranks: int = 1) -> Finding:
    """Memory that the control group or Slurm allows, and what is available; `local_ranks`: ranks on this node."""
    from shards.machine.cores import memory_limit

    with open("/proc/meminfo", encoding="ascii") as file:
        node = {line.partition(":")[0]: int(line.split()[1]) << 10 for line in file}  # in KiB there
    limit, total, available = memory_limit(), node["MemTotal"], node["MemAvailable"]
    granted = os.environ.get("SLURM_MEM_PER_NODE", "")
    most = min(filter(None, (total, limit, int(granted) << 20 if granted.isdigit() else 0)))
    text = f"limit {most / GIB:.1f} GiB, {available / GIB:.1f} of the node's {total / GIB:.1f} available"
    if min(most, available) < MEMORY_BYTES * local_ranks:
        need = f"{MEMORY_BYTES * local_ranks / GIB:.0f} GiB for {local_ranks} rank{'s' * (local_ranks > 1)}"
        advice = f"{need} are safe: sbatch --mem=0 gives all of the node; or fewer --workers"
        return slow("memory", text, advice, value=float(most))
    return ok("memory", text, value=float(most))


def check_shm() -> Finding:
    """Space in /dev/shm."""
    try:
        entry = os.statvfs("/dev/shm")
    except OSError as error:
        return wrong("shm", f"no /dev/shm: {error.strerror}", "docker --ipc=host, apptainer --bind /dev/shm")
    free, total = entry.f_bavail * entry.f_frsize, entry.f_blocks * entry.f_frsize
    text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free in /dev/shm"
    if free < SHM_BYTES:
        return slow("shm", text, "docker --shm-size=8g or --ipc=host; or remove old files there", value=float(free))
    return ok("shm", text, value=float(free))


def check_caches(gpu: bool) -> list[Finding]:
    """What the fast kernels need at their first launch, and where compiled code is kept."""
    from shards.machine import caches
    from shards.read import fastjpeg

    lacking, home = caches.triton_lacks(), os.path.expanduser("~")
    here = "a C compiler and Python's headers are here, for the fast kernels"
    compiler = ok("compiler", lacking or here, same="none" if lacking else "here")
    if lacking and gpu:
        advice = "load or install gcc on the compute nodes too; else training uses the plain kernels"
        compiler = slow("compiler", lacking, advice, same="none")
    text = f"HOME {home}, Triton {caches.triton_cache()}, JPEG decoder {os.path.dirname(fastjpeg.library_path())}"
    try:
        with tempfile.TemporaryFile(dir=home):
            return [compiler, ok("caches", text)]
    except OSError as error:
        text += f"; HOME cannot be written: {error.strerror}"
        return [compiler, slow("caches", text, "set HOME to a folder that can be written")]


def check_limits() -> list[Finding]:
    """Open files, and memory that InfiniBand may lock."""
    soft, hard = ("unlimited" if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE))
    findings = [ok("files", f"{soft} (ulimit -n)")]
    if soft != "unlimited" and soft < FILES:
        findings = [slow("files", f"{soft} open files allowed (ulimit -n)", f"ulimit -n {hard}")]
    adapters = sorted(os.listdir(INFINIBAND)) if os.path.isdir(INFINIBAND) else []
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if adapters and locked != resource.RLIM_INFINITY:
        text = f"InfiniBand is here, but only {locked >> 10} KiB may be locked (ulimit -l)"
        findings.append(slow("infiniband", text, "ulimit -l unlimited; ask the cluster's administrators"))
    elif adapters:
        findings.append(ok("infiniband", ", ".join(adapters)))
    return findings


def check_network() -> Finding:
    """Network links, and the one that the job was told to use."""
    from shards.machine.facts import network_links

    links = network_links()
    named = os.environ.get("HOROVOD_GLOO_IFACE") or os.environ.get("NCCL_SOCKET_IFNAME") or ""
    chosen = f"; {named} is to be used" if named else ""
    return ok("network", f"{', '.join(links) or 'no link says its speed'}{chosen}", same=" ".join(links))


def check_slurm() -> Finding:
    """Slurm, and the job that this runs in."""
    version = mpi.first_line(["sbatch", "--version"])
    job = os.environ.get("SLURM_JOB_ID")
    return ok("slurm", f"{version or 'none here'}{f', in job {job}' if job else ''}", same=version)


def read_rate(paths: list[str]) -> float:
    """Bytes per second of reading these files, from the disk where the page cache can be dropped."""
    start, count = time.perf_counter(), 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while block := os.read(descriptor, 4 << 20):
                count += len(block)
                if count >= READ_BYTES or time.perf_counter() - start > READ_SECONDS:
                    return count / (time.perf_counter() - start)
        finally:
            os.close(descriptor)
    return count / max(time.perf_counter() - start, 1e-9)


def check_data(split: "Split", decode: float, ranks: int = 1) -> Finding:
    """Whether reading this split keeps up with decoding on all cores.

    Args:
        decode: images/s per core.
        ranks: on this node, each with cores of its own.
    """
    from shards.machine.cores import cores_given
    from shards.machine.facts import file_system
    from shards.machine.files import is_remote

    text = f"{split.nsamples:,} samples in {len(split.shards)} shards, {split.encoding}"
    if is_remote(split.root):
        return ok("data", f"{text}, remote: job.bench loader measures it", same=text)
    paths = [split.path(shard.url) for shard in split.shards]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        text += f", but {missing[0]} is missing ({len(missing)} in all)"
        return wrong("data", text, f"copy or pack it again; python -m shards.verify {split.root} says more")
    rate, images = read_rate(paths), image_bytes(split)
    same = f"{text}, on {file_system(split.root)}"
    text = f"{same}: {rate / 1e6:,.0f} MB/s, {rate / images:,.0f} images/s"
    most = decode * cores_given().count * ranks
    if rate / images < most:
        advice = "pack to a local disk, or STAGE=1 sbatch slurm/train.sh copies the shards there"
        text += f", fewer than the cores decode ({most:,.0f})"
        return slow("data", text, advice, same=same, value=rate / images)
    return ok("data", text, same=same, value=rate / images)


def image_bytes(split: "Split") -> float:
    """Bytes of the shards per image."""
    return sum(os.path.getsize(split.path(shard.url)) for shard in split.shards) / split.nsamples
