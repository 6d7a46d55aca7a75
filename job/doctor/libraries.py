"""Checks of what is installed: Python, the project's code, torch, Horovod, MPI and the packages that shards need.

In: the environment. Out: findings. Each library is imported in its own process, so that a crash is one line.
"""

import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from typing import Any

from job.doctor.findings import REBUILD, SETUP, Finding, ok, wrong
from job.ranks import mpi
from shards.machine.facts import code_version, versions
from shards.machine.launcher import alone

PROBE_SECONDS = 90  # a library that takes longer to import counts as broken
TORCH_RANGE = ((2, 11), (2, 15))  # as in setup.py: from, and below


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


PROBES = ("torch", "horovod", "mpi4py")  # NAME: what NAME_facts says, in a process of its own


def probe(name: str, module: str = __name__) -> Any:
    """What NAME_facts() of `module` returns in a process of its own; {"error": why} where that fails."""
    code = f"import json, {module} as here; print(json.dumps(here.{name}_facts()))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            stdin=subprocess.DEVNULL,
            env=alone(),
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
    version = ".".join(platform.python_version_tuple()[:2])
    return ok("python", f"{platform.python_version()}{tested}, {sys.executable}", same=version)


def check_code() -> Finding:
    """The version of the project's own code."""
    return ok("code", f"{code_version()} (hash of job/ and shards/)", same=code_version())


def check_torch(torch: dict[str, Any]) -> list[Finding]:
    """torch, its GPUs, the driver and NCCL."""
    if "error" in torch:
        return [wrong("torch", f"does not import: {torch['error']}", SETUP)]
    release = tuple(int(part) for part in torch["version"].split(".")[:2])
    tested = "" if TORCH_RANGE[0] <= release < TORCH_RANGE[1] else ", not tested (2.11 to 2.14 are)"
    findings = [ok("torch", torch["version"] + tested, same=torch["version"])]
    driver = mpi.first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if torch["gpus"]:
        text = f"{len(torch['gpus'])} x {torch['gpus'][0]}, CUDA {torch['cuda']}, driver {driver or 'unknown'}"
        same = f"{torch['gpus'][0]}, driver {driver}"
        count = float(len(torch["gpus"]))
        findings.append(ok("gpu", f"{text}, NCCL {torch['nccl'] or 'none'}", same=same, value=count))
        if not torch["nccl"]:
            findings.append(wrong("nccl", "this torch has none", "install a torch that is built with NCCL"))
    elif driver and torch["cuda"]:
        advice = f"a driver for CUDA {torch['cuda']} or newer, or a torch for an older CUDA"
        findings.append(wrong("gpu", f"torch cannot use it (driver {driver}) {torch['said']}", advice))
    elif driver:
        text = f"driver {driver} is here, but this torch has no CUDA"
        findings.append(wrong("gpu", text, "install a torch with CUDA"))
    else:
        findings.append(ok("gpu", "none on this machine: training on the CPU", same="none"))
    return findings


def check_horovod(horovod: dict[str, Any], torch: dict[str, Any]) -> list[Finding]:
    """Horovod, what it was built with, and its launcher."""
    if "error" in horovod:
        return [wrong("horovod", f"does not import with this torch: {horovod['error']}", REBUILD)]
    features = ", ".join(name for name in ("mpi", "gloo", "nccl") if horovod[name])
    version = installed_version("horovod") or horovod["version"]
    text = f"{version}, built with {features or 'nothing'}"
    findings = [ok("horovod", text, same=text)]
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
    return ok("mpirun", text, same=mpi.describe(version))


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
