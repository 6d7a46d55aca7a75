"""What is installed, what is slow, what is wrong, and what to do: `python -m job.doctor [--data DIR] [--json]`.

In: the environment, the machine, a folder of shards. Out: a line per subject, `ok`, `slow` or `wrong`, and advice. Exit
code 0 when nothing is wrong, else 2. Each library is imported in its own process, so that a crash is one line.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import io
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from job.ranks import mpi
from shards import ROOT
from shards.command import Parser, run
from shards.errors import InputError
from shards.machine.facts import versions

if TYPE_CHECKING:
    from shards.format.split import Split

PROBE_SECONDS = 90  # a library that takes longer to import counts as broken
TORCH_RANGE = ((2, 11), (2, 15))  # as in setup.py: from, and below
DECODE_SECONDS = 0.3
READ_SECONDS = 2.0
READ_BYTES = 256 << 20
SHM_BYTES = 1 << 30  # batches pass from the readers to the training through /dev/shm
FILES = 1024  # open shards, pipes and sockets of a rank
INFINIBAND = "/sys/class/infiniband"

_INSTALL = os.path.join(ROOT, "slurm", "install.sh")
# `pip install .` copies job and shards only.
SETUP = "bash slurm/install.sh" if os.path.exists(_INSTALL) else "in a clone of the project: bash slurm/install.sh"
REBUILD = f"{SETUP} --rebuild"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str  # ok, slow or wrong
    name: str
    text: str
    advice: str = ""  # what to do where something is slow or wrong


ok = functools.partial(Finding, "ok")
slow = functools.partial(Finding, "slow")  # it works, slower than it could
wrong = functools.partial(Finding, "wrong")  # it does not work


# ---- Libraries.


def torch_facts() -> dict[str, Any]:
    """What torch says of itself and of the GPUs here."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import torch

        found = torch.cuda.is_available()
        nccl = found and hasattr(torch._C, "_nccl_version")
        return {
            "version": torch.__version__,
            "cuda": torch.version.cuda or "",
            "available": found,
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found else [],
            "nccl": ".".join(map(str, torch.cuda.nccl.version())) if nccl else "",
            "said": " ".join(str(w.message) for w in caught if "CUDA" in str(w.message) or "NVIDIA" in str(w.message)),
        }


def horovod_facts() -> dict[str, Any]:
    """What Horovod was built with, and the MPI that it loads."""
    import ctypes

    import horovod
    import horovod.torch as hvd

    libraries = mpi_libraries()
    version = ctypes.create_string_buffer(8192)
    if libraries:
        ctypes.CDLL(libraries[0]).MPI_Get_library_version(version, ctypes.byref(ctypes.c_int()))
    built = {name: bool(getattr(hvd, f"{name}_built")()) for name in ("mpi", "gloo", "nccl")}
    about = {"version": horovod.__version__, "libraries": libraries, "mpi_version": version.value.decode()}
    return built | about


def mpi4py_facts() -> dict[str, Any]:
    """The MPI that mpi4py loads."""
    import mpi4py

    mpi4py.rc.initialize = False
    from mpi4py import MPI

    version = MPI.Get_library_version()
    return {"version": mpi4py.__version__, "libraries": mpi_libraries(), "mpi_version": version}


def mpi_libraries() -> list[str]:
    """Paths of the MPI libraries that this process has loaded."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
        return sorted(set(re.findall(mpi.LIBRARY, file.read())))


PROBES = ("torch", "horovod", "mpi4py")  # libraries NAME whose function NAME_facts runs in its own process


def probe(name: str) -> dict[str, Any]:
    """What the library `name` says of itself; {"error": why} where it does not import."""
    code = f"import json; from job import doctor; print(json.dumps(doctor.{name}_facts()))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {PROBE_SECONDS} s"}
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": lines[-1].strip() if lines else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def check_python() -> Finding:
    """The version of Python."""
    tested = "" if (3, 11) <= sys.version_info[:2] <= (3, 13) else ", not tested (3.11 to 3.13 are)"
    return ok("python", f"{platform.python_version()}{tested}, {sys.executable}")


def check_torch(torch: dict[str, Any]) -> list[Finding]:
    """torch, its GPUs, the driver and NCCL."""
    if "error" in torch:
        return [wrong("torch", f"does not import: {torch['error']}", SETUP)]
    release = tuple(int(part) for part in torch["version"].split(".")[:2])
    tested = "" if TORCH_RANGE[0] <= release < TORCH_RANGE[1] else ", not tested (2.11 to 2.14 are)"
    findings = [ok("torch", torch["version"] + tested)]
    driver = mpi.first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if torch["gpus"]:
        text = f"{len(torch['gpus'])} x {torch['gpus'][0]}, CUDA {torch['cuda']}, driver {driver or 'unknown'}"
        findings.append(ok("gpu", f"{text}, NCCL {torch['nccl'] or 'none'}"))
        if not torch["nccl"]:
            findings.append(wrong("nccl", "this torch has none", "install a torch that is built with NCCL"))
    elif driver and torch["cuda"]:
        advice = f"a driver for CUDA {torch['cuda']} or newer, or a torch for an older CUDA"
        findings.append(wrong("gpu", f"torch cannot use it (driver {driver}) {torch['said']}", advice))
    elif driver:
        text = f"driver {driver} is here, but this torch has no CUDA"
        findings.append(wrong("gpu", text, "install a torch with CUDA"))
    else:
        findings.append(ok("gpu", "none on this machine: training on the CPU"))
    return findings


def check_horovod(horovod: dict[str, Any], torch: dict[str, Any]) -> list[Finding]:
    """Horovod, what it was built with, and its launcher."""
    if "error" in horovod:
        return [wrong("horovod", f"does not import with this torch: {horovod['error']}", REBUILD)]
    features = ", ".join(name for name in ("mpi", "gloo", "nccl") if horovod[name])
    version = installed_version("horovod") or horovod["version"]
    findings = [ok("horovod", f"{version}, built with {features or 'nothing'}")]
    if torch.get("gpus") and not horovod["nccl"]:
        findings.append(wrong("nccl", "Horovod was built without it, and a GPU is here", f"{REBUILD} --cuda yes"))
    if not shutil.which("horovodrun"):
        findings.append(wrong("horovodrun", "not on PATH", ". slurm/activate.sh"))
    return findings


def check_mpi(horovod: dict[str, Any], mpi4py: dict[str, Any]) -> list[Finding]:
    """mpirun, Horovod and mpi4py must use the same MPI: else each rank believes it is alone, or the job crashes."""
    return [_check_mpirun(horovod), _check_mpi4py(horovod, mpi4py)]


def _check_mpirun(horovod: dict[str, Any]) -> Finding:
    mpirun = shutil.which("mpirun")
    if not mpirun:
        if not horovod.get("mpi"):
            return ok("mpirun", "not on PATH")
        advice = f"load the module of the MPI that Horovod was built with, or {SETUP}"
        return wrong("mpirun", "not on PATH", advice)
    version, linked = mpi.output([mpirun, "--version"]), horovod.get("mpi_version", "")
    if not version:
        return wrong("mpirun", f"{mpirun} does not run", "load its module, or --mpi wheel --rebuild")
    text = f"{mpi.describe(version)}, {mpirun}"
    if not mpi.fits(version, linked):
        text += f"; Horovod was built with {mpi.describe(linked)} ({horovod['libraries'][0]})"
        return wrong("mpirun", text, f"load the module of that MPI, or {REBUILD}")
    return ok("mpirun", text)


def _check_mpi4py(horovod: dict[str, Any], mpi4py: dict[str, Any]) -> Finding:
    if "error" in mpi4py:
        return wrong("mpi4py", f"does not import: {mpi4py['error']}", SETUP)
    ours, theirs = ({os.path.realpath(path) for path in side.get("libraries", ())} for side in (mpi4py, horovod))
    if ours and theirs and not ours & theirs:
        advice = "pip install --force-reinstall --no-binary mpi4py mpi4py, with that MPI's mpicc on PATH"
        return wrong("mpi4py", f"uses {min(ours)}, Horovod uses {min(theirs)}", advice)
    return ok("mpi4py", f"{mpi4py['version']}, {mpi.describe(mpi4py['mpi_version'])}")


def check_tensorboard() -> Finding:
    """Whether the command tensorboard starts."""
    version = installed_version("tensorboard")
    if not version:
        return wrong("tensorboard", "not installed", SETUP)
    if tuple(map(int, version.split(".")[:2])) >= (2, 21) or importlib.util.find_spec("pkg_resources"):
        return ok("tensorboard", version)
    text = f"{version} needs pkg_resources, which setuptools 82 and later no longer have: the command does not start"
    return wrong("tensorboard", text, "pip install --upgrade tensorboard")


def check_webdataset() -> Finding:
    """The library that writes shards."""
    version = installed_version("webdataset")
    return ok("webdataset", version) if version else wrong("webdataset", "not installed", SETUP)


def installed_version(package: str) -> str:
    """Version of an installed package; empty: not installed, or a module of the cluster without metadata."""
    return versions(package).get(package, "")


# ---- The machine.


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
        return slow("decoder", text, "pip install simplejpeg decodes about twice as fast"), pillow
    rate = rate_of(lambda data: simplejpeg.decode_jpeg(data, "RGB"))
    text = f"simplejpeg {simplejpeg.__version__} {rate:,.0f} images/s per core (256 x 256); {text}"
    from shards.read import fastjpeg, images

    if fastjpeg.missing():
        return slow("decoder", f"{text}; no shards/read/jpeg.c", images.slow_decoder()), rate
    rate = rate_of(images.decode)
    return ok("decoder", f"shards/read/jpeg.c {rate:,.0f}, {text}"), rate


def check_cores() -> list[Finding]:
    """Cores that this process may use, and OMP_NUM_THREADS."""
    from shards.machine.cores import cgroup_quota, cores_given

    affinity, machine, given = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cores_given().count
    quota = cgroup_quota()
    text = f"{given} of {machine} given (affinity {affinity}, cgroup {'no limit' if quota is None else f'{quota:g}'})"
    cores = ok("cores", text)
    if given == 1 and machine > 1:
        cores = slow("cores", text, "in a job: --cpus-per-task; with mpirun by hand: --bind-to none")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > given:
        text = f"OMP_NUM_THREADS={threads}, but {given} core(s) are given"
        return [cores, slow("threads", text, f"export OMP_NUM_THREADS={given}, or unset it")]
    return [cores, ok("threads", f"OMP_NUM_THREADS {threads or 'not set'}")]


def check_memory() -> Finding:
    """Space for batches in /dev/shm."""
    try:
        entry = os.statvfs("/dev/shm")
    except OSError as error:
        return wrong("shm", f"no /dev/shm: {error.strerror}", "docker --ipc=host, apptainer --bind /dev/shm")
    free, total = entry.f_bavail * entry.f_frsize, entry.f_blocks * entry.f_frsize
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free in /dev/shm"
    if free < SHM_BYTES:
        return slow("shm", text, "docker --shm-size=8g, or remove old files there; or fewer --workers")
    return ok("shm", text)


def check_caches(gpu: bool) -> list[Finding]:
    """What the fast kernels need at their first launch, and where compiled code is kept."""
    from shards.machine import caches
    from shards.read import fastjpeg

    lacking, home = caches.triton_lacks(), os.path.expanduser("~")
    compiler = ok("compiler", lacking or "a C compiler and Python's headers are here, for the fast kernels")
    if lacking and gpu:
        advice = "load or install gcc on the compute nodes too; else training uses the plain kernels"
        compiler = slow("compiler", lacking, advice)
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


def check_slurm() -> Finding:
    """Slurm, and the job that this runs in."""
    version = mpi.first_line(["sbatch", "--version"])
    job = os.environ.get("SLURM_JOB_ID")
    return ok("slurm", f"{version or 'none here'}{f', in job {job}' if job else ''}")


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


def check_data(split: "Split", decode: float) -> Finding:
    """Whether reading this split keeps up with decoding on all cores; `decode`: images/s per core."""
    from shards.machine.cores import cores_given
    from shards.machine.facts import file_system
    from shards.machine.files import is_remote

    text = f"{split.nsamples:,} samples in {len(split.shards)} shards, {split.encoding}"
    if is_remote(split.root):
        return ok("data", f"{text}, remote: job.bench loader measures it")
    paths = [split.path(shard.url) for shard in split.shards]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        text += f", but {missing[0]} is missing ({len(missing)} in all)"
        return wrong("data", text, f"copy or pack it again; python -m shards.verify {split.root} says more")
    rate = read_rate(paths)
    images = rate / (sum(os.path.getsize(path) for path in paths) / split.nsamples)
    text += f", on {file_system(split.root)}: {rate / 1e6:,.0f} MB/s, {images:,.0f} images/s"
    most = decode * cores_given().count
    if images < most:
        advice = "pack to a local disk, or STAGE=1 sbatch slurm/train.sh copies the shards there"
        return slow("data", f"{text}, fewer than the cores decode ({most:,.0f})", advice)
    return ok("data", text)


def examine(data: str | None) -> Iterator[Finding]:
    """The findings in the order of the report, each as soon as it is known.

    Raises InputError when there is no such folder of shards.
    """
    from shards.format.split import load_split

    split = load_split(data, "train") if data is not None else None
    with concurrent.futures.ThreadPoolExecutor(len(PROBES)) as pool:
        probes = {name: pool.submit(probe, name) for name in PROBES}
        yield check_python()
        torch = probes["torch"].result()
        yield from check_torch(torch)
        horovod = probes["horovod"].result()
        yield from check_horovod(horovod, torch)
        yield from check_mpi(horovod, probes["mpi4py"].result())
        yield check_webdataset()
        yield check_tensorboard()
    decoder, rate = check_decoder()
    yield decoder
    yield from check_cores()
    yield check_memory()
    yield from check_caches(bool(torch.get("gpus")))
    yield from check_limits()
    yield check_slurm()
    if split is not None:
        yield check_data(split, rate)


def main() -> int:
    """The command. Raises InputError where something is wrong."""
    parser = Parser(
        prog="python -m job.doctor", description="What is installed, what is slow, what is wrong, what to do."
    )
    parser.add_argument("--data", metavar="DIR", help="also measure how fast the shards in DIR are read")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    findings = []
    for finding in examine(options.data):
        findings.append(finding)
        if not options.json:
            print(f"{finding.status:<6}{finding.name:<12}{finding.text}", flush=True)
            if finding.advice:
                print(f"{'':18}-> {finding.advice}", flush=True)
    worst = max((finding.status for finding in findings), key=("ok", "slow", "wrong").index)
    if options.json:
        print(json.dumps({"status": worst, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    broken = [finding.name for finding in findings if finding.status == "wrong"]
    if broken:
        raise InputError(f"wrong here: {', '.join(broken)}; each line above says what to do")
    return 0


if __name__ == "__main__":
    run(main)
