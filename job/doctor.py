"""What is installed, what is slow, what is wrong, and what to do: `python -m job.doctor [--data DIR] [--json]`.

In: the environment, the machine, a folder of shards. Out: a line for each thing, `ok`, `slow` or `wrong`, and advice.
Exit code 0 when nothing is wrong, else 2. Each library is looked at in a process of its own: a crash is a line.
"""

import concurrent.futures
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from job.ranks import mpi
from shards import ROOT
from shards.command import Parser, run
from shards.errors import InputError

if TYPE_CHECKING:
    from shards.format.split import Split

PROBE_SECONDS = 90  # a library that takes longer to import is wrong
TORCH_RANGE = ((2, 11), (2, 15))  # as in setup.py: from, and below
DECODE_SECONDS = 0.3
READ_SECONDS = 2.0
READ_BYTES = 256 << 20
SHM_BYTES = 1 << 30  # batches on their way from the readers to the training lie in /dev/shm
FILES = 1024  # open shards, pipes and sockets of a rank

_INSTALL = os.path.join(ROOT, "slurm", "install.sh")
# `pip install .` copies job and shards alone.
SETUP = "bash slurm/install.sh" if os.path.exists(_INSTALL) else "in a clone of the project: bash slurm/install.sh"
REBUILD = f"{SETUP} --rebuild"

_LIBRARIES = f'libraries = sorted(set(re.findall({mpi.LIBRARY!r}, open("/proc/self/maps").read())))'

# What a library says of itself. Each prints one JSON object as its last line.
PROBES = {
    "torch": """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    found = torch.cuda.is_available()
    print(json.dumps({
        "version": torch.__version__, "cuda": torch.version.cuda or "", "available": found,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if found else [],
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if found and hasattr(torch._C, "_nccl_version") else "",
        "said": " ".join(str(w.message) for w in caught if "CUDA" in str(w.message) or "NVIDIA" in str(w.message)),
    }))
""",
    "horovod": """
import ctypes, json, re
import horovod, horovod.torch as hvd
built = {name: bool(getattr(hvd, name + "_built")()) for name in ("mpi", "gloo", "nccl")}
"""
    + _LIBRARIES
    + """
text = ctypes.create_string_buffer(8192)
if libraries:
    ctypes.CDLL(libraries[0]).MPI_Get_library_version(text, ctypes.byref(ctypes.c_int()))
print(json.dumps({"version": horovod.__version__, **built, "libraries": libraries, "mpi_version": text.value.decode()}))
""",
    "mpi4py": """
import json, re
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
"""
    + _LIBRARIES
    + """
print(json.dumps({"version": mpi4py.__version__, "libraries": libraries, "mpi_version": MPI.Get_library_version()}))
""",
    "webdataset": """
import json, webdataset
print(json.dumps({"version": webdataset.__version__}))
""",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: str  # "ok", "slow" or "wrong"
    name: str
    text: str
    advice: str = ""  # what to do, where something is slow or wrong


def probe(name: str) -> dict:
    """What the library `name` says of itself; {"error": why} when it does not import."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBES[name]],
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
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": said[-1].strip() if said else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def first_line(command: list[str]) -> str:
    """First line that a command prints, or an empty string when it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else ""


def check_python() -> Finding:
    tested = "" if (3, 11) <= sys.version_info[:2] <= (3, 13) else ", not tested (3.11 to 3.13 are)"
    return Finding("ok", "python", f"{platform.python_version()}{tested}, {sys.executable}")


def check_torch(torch: dict) -> list[Finding]:
    if "error" in torch:
        return [Finding("wrong", "torch", f"does not import: {torch['error']}", SETUP)]
    findings = []
    release = tuple(int(part) for part in torch["version"].split(".")[:2])
    tested = "" if TORCH_RANGE[0] <= release < TORCH_RANGE[1] else ", not tested (2.11 to 2.14 are)"
    findings.append(Finding("ok", "torch", torch["version"] + tested))
    driver = first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if torch["gpus"]:
        text = f"{len(torch['gpus'])} x {torch['gpus'][0]}, CUDA {torch['cuda']}, driver {driver or 'unknown'}"
        findings.append(Finding("ok", "gpu", f"{text}, NCCL {torch['nccl'] or 'none'}"))
        if not torch["nccl"]:
            findings.append(Finding("wrong", "nccl", "this torch has none", "install a torch that is built with NCCL"))
    elif driver and torch["cuda"]:
        advice = f"a driver for CUDA {torch['cuda']} or newer, or a torch for an older CUDA"
        findings.append(Finding("wrong", "gpu", f"torch does not reach it (driver {driver}) {torch['said']}", advice))
    elif driver:
        findings.append(
            Finding("wrong", "gpu", f"driver {driver} is here, but this torch has no CUDA", "install a torch with CUDA")
        )
    else:
        findings.append(Finding("ok", "gpu", "none on this machine: training on the CPU"))
    return findings


def check_horovod(horovod: dict, torch: dict) -> list[Finding]:
    if "error" in horovod:
        return [Finding("wrong", "horovod", f"does not import with this torch: {horovod['error']}", REBUILD)]
    features = [name for name in ("mpi", "gloo", "nccl") if horovod[name]]
    version = horovod["version"]
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        pass  # a module of the cluster may have no metadata
    findings = [Finding("ok", "horovod", f"{version}, built with {', '.join(features) or 'nothing'}")]
    if torch.get("gpus") and not horovod["nccl"]:
        findings.append(
            Finding("wrong", "nccl", "Horovod was built without it, and a GPU is here", f"{REBUILD} --cuda yes")
        )
    launcher = shutil.which("horovodrun")
    if not launcher:
        findings.append(Finding("wrong", "horovodrun", "not on PATH", ". slurm/activate.sh"))
    return findings


def check_mpi(horovod: dict, mpi4py: dict) -> list[Finding]:
    """mpirun, Horovod and mpi4py must be of one MPI: else each rank believes that it is alone, or the job crashes."""
    findings = []
    mpirun = shutil.which("mpirun")
    version = mpi.output([mpirun, "--version"]) if mpirun else ""
    text = f"{mpi.describe(version)}, {mpirun}"
    linked = horovod.get("mpi_version", "")
    if not mpirun:
        needed = bool(horovod.get("mpi"))
        advice = f"load the module of the MPI that Horovod was built with, or {SETUP}"
        findings.append(Finding("wrong" if needed else "ok", "mpirun", "not on PATH", advice if needed else ""))
    elif not version:
        findings.append(
            Finding("wrong", "mpirun", f"{mpirun} does not run", "load its module, or --mpi wheel --rebuild")
        )
    elif not mpi.fits(version, linked):
        text += f"; Horovod was built with {mpi.describe(linked)} ({horovod['libraries'][0]})"
        findings.append(Finding("wrong", "mpirun", text, f"load the module of that MPI, or {REBUILD}"))
    else:
        findings.append(Finding("ok", "mpirun", text))
    if "error" in mpi4py:
        findings.append(Finding("wrong", "mpi4py", f"does not import: {mpi4py['error']}", SETUP))
        return findings
    text = f"{mpi4py['version']}, {mpi.describe(mpi4py['mpi_version'])}"
    ours, theirs = ({os.path.realpath(path) for path in side.get("libraries", ())} for side in (mpi4py, horovod))
    if ours and theirs and not ours & theirs:
        advice = "pip install --force-reinstall --no-binary mpi4py mpi4py, with that MPI's mpicc on PATH"
        findings.append(Finding("wrong", "mpi4py", f"uses {min(ours)}, Horovod uses {min(theirs)}", advice))
    else:
        findings.append(Finding("ok", "mpi4py", text))
    return findings


def check_tensorboard() -> Finding:
    try:
        version = importlib.metadata.version("tensorboard")
    except importlib.metadata.PackageNotFoundError:
        return Finding("wrong", "tensorboard", "not installed", SETUP)
    if tuple(map(int, version.split(".")[:2])) >= (2, 21) or importlib.util.find_spec("pkg_resources"):
        return Finding("ok", "tensorboard", version)
    text = f"{version} needs pkg_resources, which setuptools 82 and later no longer have: the command does not start"
    return Finding("wrong", "tensorboard", text, "pip install --upgrade tensorboard")


def check_webdataset(webdataset: dict) -> Finding:
    if "error" in webdataset:
        return Finding("wrong", "webdataset", f"does not import: {webdataset['error']}", SETUP)
    return Finding("ok", "webdataset", webdataset["version"])


def decode_rate(decode, data: bytes) -> float:
    """Images a second that one core decodes."""
    decode(data)
    start, count = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < DECODE_SECONDS:
        decode(data)
        count += 1
    return count / seconds


def check_decoder() -> tuple[Finding, float]:
    """The line of the JPEG decoder, and images a second and core."""
    import numpy as np
    from PIL import Image, features

    # Noise at all scales, the coarse ones strongest: roughly a photograph, and as large as a file (23 kB).
    random = np.random.default_rng(0)
    weights = [1.3**octave for octave in range(6)]
    picture = np.zeros((256, 256, 3), np.float32)
    for octave, weight in enumerate(weights):
        noise = random.integers(0, 256, (256 >> octave, 256 >> octave, 3), dtype=np.uint8)
        picture += weight / sum(weights) * np.asarray(Image.fromarray(noise).resize((256, 256)), np.float32)
    file = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(file, "JPEG", quality=90)
    data = file.getvalue()
    pillow = decode_rate(lambda data: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), data)
    turbo = features.version("libjpeg_turbo") or "without libjpeg-turbo"
    old = f"Pillow {importlib.metadata.version('pillow')} ({turbo}) {pillow:,.0f}"
    try:
        import simplejpeg
    except ImportError as error:
        text = f"{old} images/s a core (256 x 256); no simplejpeg ({error})"
        return Finding("slow", "decoder", text, "pip install simplejpeg decodes about twice as fast"), pillow
    rate = decode_rate(lambda data: simplejpeg.decode_jpeg(data, "RGB"), data)
    text = f"simplejpeg {simplejpeg.__version__} {rate:,.0f} images/s a core (256 x 256); {old}"
    from shards.read import fastjpeg, images

    if fastjpeg.missing():
        return Finding("slow", "decoder", f"{text}; no shards/read/jpeg.c", images.slow_decoder()), rate
    rate = decode_rate(images.decode, data)
    return Finding("ok", "decoder", f"shards/read/jpeg.c {rate:,.0f}, {text}"), rate


def check_cores() -> list[Finding]:
    from shards.machine.cores import cgroup_quota, cores_given

    affinity, machine, given = len(os.sched_getaffinity(0)), os.cpu_count() or 1, cores_given().count
    quota = cgroup_quota()
    text = f"{given} of {machine} given (affinity {affinity}, cgroup {'no limit' if quota is None else f'{quota:g}'})"
    advice = "in a job: --cpus-per-task; with mpirun by hand: --bind-to none"
    findings = [Finding("slow", "cores", text, advice) if given == 1 < machine else Finding("ok", "cores", text)]
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > given:
        text = f"OMP_NUM_THREADS={threads}, but {given} core(s) are given"
        findings.append(Finding("slow", "threads", text, f"export OMP_NUM_THREADS={given}, or unset it"))
    else:
        findings.append(Finding("ok", "threads", f"OMP_NUM_THREADS {threads or 'not set'}"))
    return findings


def check_memory() -> Finding:
    try:
        entry = os.statvfs("/dev/shm")
    except OSError as error:
        return Finding("wrong", "shm", f"no /dev/shm: {error.strerror}", "docker --ipc=host, apptainer --bind /dev/shm")
    free, total = entry.f_bavail * entry.f_frsize, entry.f_blocks * entry.f_frsize
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free in /dev/shm"
    if free < SHM_BYTES:
        return Finding("slow", "shm", text, "docker --shm-size=8g, or remove what lies there; or fewer --workers")
    return Finding("ok", "shm", text)


def check_caches(gpu: bool) -> list[Finding]:
    """What the fast kernels need at their first launch, and where what is compiled here is kept."""
    from shards.machine import caches
    from shards.read import fastjpeg

    lacking, home = caches.triton_lacks(), os.path.expanduser("~")
    compiler = Finding("ok", "compiler", "a C compiler and Python's headers are here, for the fast kernels")
    if lacking:
        advice = "load or install gcc on the compute nodes too; else training uses the plain kernels"
        compiler = Finding("slow" if gpu else "ok", "compiler", lacking, advice if gpu else "")
    text = f"HOME {home}, Triton {caches.triton_cache()}, JPEG decoder {os.path.dirname(fastjpeg.library_path())}"
    try:
        with tempfile.TemporaryFile(dir=home):
            return [compiler, Finding("ok", "caches", text)]
    except OSError as error:
        text += f"; HOME cannot be written: {error.strerror}"
        return [compiler, Finding("slow", "caches", text, "set HOME to a folder that can be written")]


def check_limits() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES:
        most = "unlimited" if hard == resource.RLIM_INFINITY else hard
        findings = [Finding("slow", "files", f"{soft} open files allowed (ulimit -n)", f"ulimit -n {most}")]
    else:
        findings = [Finding("ok", "files", f"{'unlimited' if soft == resource.RLIM_INFINITY else soft} (ulimit -n)")]
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if os.path.isdir("/sys/class/infiniband") and os.listdir("/sys/class/infiniband"):
        if locked != resource.RLIM_INFINITY:
            text = f"InfiniBand is here, but only {locked >> 10} KiB may be locked (ulimit -l)"
            findings.append(
                Finding("slow", "infiniband", text, "ulimit -l unlimited; ask the cluster's administrators")
            )
        else:
            findings.append(Finding("ok", "infiniband", ", ".join(sorted(os.listdir("/sys/class/infiniband")))))
    return findings


def check_slurm() -> Finding:
    version = first_line(["sbatch", "--version"])
    job = os.environ.get("SLURM_JOB_ID")
    return Finding("ok", "slurm", f"{version or 'none here'}{f', in job {job}' if job else ''}")


def read_rate(paths: list[str]) -> float:
    """Bytes a second that reading these files gives; what the page cache holds of them is dropped if it can be."""
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
    """Whether reading this split keeps up with decoding on the cores given; `decode` in images a second and core."""
    from shards.machine.caches import file_system
    from shards.machine.cores import cores_given
    from shards.machine.files import is_remote

    text = f"{split.nsamples:,} samples in {len(split.shards)} shards, {split.encoding}"
    if is_remote(split.root):
        return Finding("ok", "data", f"{text}, remote: job.bench loader measures it")
    paths = [split.path(shard.url) for shard in split.shards]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        text += f", but {missing[0]} is not there ({len(missing)} missing)"
        return Finding("wrong", "data", text, f"copy or pack it again; python -m shards.verify {split.root} tells more")
    rate = read_rate(paths)
    images = rate / (sum(os.path.getsize(path) for path in paths) / split.nsamples)
    text += f", on {file_system(split.root)}: {rate / 1e6:,.0f} MB/s, {images:,.0f} images/s"
    most = decode * cores_given().count
    if images < most:
        advice = "pack to a local disk, or STAGE=1 sbatch slurm/train.sh copies the shards there"
        return Finding("slow", "data", f"{text}, fewer than the cores decode ({most:,.0f})", advice)
    return Finding("ok", "data", text)


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
        yield check_webdataset(probes["webdataset"].result())
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
    wrong = [finding.name for finding in findings if finding.status == "wrong"]
    if wrong:
        raise InputError(f"wrong here: {', '.join(wrong)}; what to do stands beside each")
    return 0


if __name__ == "__main__":
    run(main)
