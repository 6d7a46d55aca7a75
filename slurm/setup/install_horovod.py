"""The Horovod of this environment: the one that is installed if it works, else one that is built, or from the cache."""

import argparse
import dataclasses
import os
import pathlib
import shutil
import sys

import build_horovod
from compilers import check_compiler, check_python_headers
from find_cuda import Cuda, choose_cuda, cuda_architectures, cuda_home, gpu_visible
from find_mpi import Mpi, check_mpicxx, choose_mpi, mpi_library_folder, mpi_wheel
from packages import SETUP, Torch, distribution, install_beside_torch
from shell import Failed, Missing, ask_python, mpi_names, on_path, pip, say


@dataclasses.dataclass(frozen=True)
class Horovod:
    version: str  # of the distribution: 0.28.1+alexnet.p....k.... if we built it
    mpi: bool
    gloo: bool
    nccl: bool
    library: str = ""  # what MPI_Get_library_version of its MPI returns

    @property
    def ours(self) -> bool:
        return "+alexnet." in self.version

    @property
    def current(self) -> bool:
        """Not ours, or ours with today's patches."""
        return not self.ours or f"p{build_horovod.patch_hash()}" in self.version


_ASK = f"""
import ctypes, json, re, horovod, horovod.torch as hvd
text = ctypes.create_string_buffer(8192)
for path in re.findall({mpi_names.LIBRARY!r}, open("/proc/self/maps").read())[:1]:
    ctypes.CDLL(path).MPI_Get_library_version(text, ctypes.byref(ctypes.c_int()))
built = {{name: bool(getattr(hvd, name + "_built")()) for name in ("mpi", "gloo", "nccl")}}
print(json.dumps({{"version": horovod.__version__, "library": text.value.decode(), **built}}))
"""


def find_horovod() -> tuple[Horovod | None, str]:
    """The installed Horovod if it works with the installed torch; else None and why not (empty: there is none)."""
    version = distribution("horovod")
    if not version and not shutil.which("horovodrun"):
        return None, ""
    found, reason = ask_python(_ASK)
    if found is None:
        return None, reason
    return Horovod(**(found | {"version": version or found["version"]})), ""


def reason_to_build(options: argparse.Namespace, torch: Torch, here: Horovod | None, broken: str) -> str:
    """Why the installed Horovod is not enough, or an empty string."""
    if here is None:
        return f"the one here does not work ({broken})" if broken else "there is none"
    if options.rebuild:
        return "--rebuild"
    if not here.current:
        return "slurm/setup/patches have changed since it was built"
    mpirun = on_path("mpirun")
    said = mpi_names.output([mpirun, "--version"]) if mpirun and here.mpi else ""
    if not mpi_names.fits(said, here.library):
        mixed = f"it uses {mpi_names.describe(here.library)}, and {mpirun} is of {mpi_names.describe(said)}"
        if not here.ours:
            raise Missing(f"Horovod {here.version}: {mixed}; load the module of that MPI, or use --rebuild")
        return mixed
    if options.mpi != "auto" and (options.mpi == "wheel") != bool(mpi_wheel()):
        return f"--mpi {options.mpi}"
    if options.cuda == "yes" and not here.nccl or options.cuda == "no" and here.nccl:
        return f"--cuda {options.cuda}"
    if options.cuda == "auto" and torch.cuda and here.ours and not here.nccl and cuda_home():
        return "it was built without CUDA, and CUDA is here now"
    return ""


def step_horovod(options: argparse.Namespace, torch: Torch, cache: pathlib.Path) -> Horovod:
    """Keep the installed Horovod, or install one. Raises Missing or Failed."""
    here, broken = find_horovod()
    why = reason_to_build(options, torch, here, broken)
    if here and not why:
        if here.mpi and not (shutil.which("mpirun") or shutil.which("srun")):
            raise Missing(
                f"Horovod {here.version} is here and uses MPI, but mpirun is not on PATH; load the module of that MPI, "
                "or build another Horovod with --mpi wheel --rebuild"
            )
        say(f"horovod: {here.version} works with this torch, kept")
        if torch.cuda and not here.nccl and gpu_visible():
            say("horovod: WARNING: it has no NCCL, though a GPU is here; --cuda yes --rebuild builds one that has")
        return here
    say(f"horovod: to be built, because {why}")
    wheel = get_wheel(choose_mpi(options.mpi), choose_cuda(options.cuda, torch), torch, cache, options.rebuild)
    install_beside_torch(torch, SETUP["HOROVOD_REQUIRES"], "install what Horovod needs")
    pip("install", "--force-reinstall", "--no-deps", str(wheel), what="install the Horovod wheel")
    here, broken = find_horovod()
    if here is None:
        raise Failed(f"Horovod was built but cannot be imported: {broken or 'pip put it elsewhere'}")
    return here


def get_wheel(mpi: Mpi, cuda: Cuda, torch: Torch, cache: pathlib.Path, rebuild: bool) -> pathlib.Path:
    """The wheel of Horovod for this machine, from the cache unless `rebuild`, else built."""
    target = build_horovod.Target(
        python=sys.implementation.cache_tag,
        torch=torch.version,
        cxx11_abi=torch.abi,
        mpi=f"{mpi.kind} {mpi.version}",
        mpi_libraries=mpi_library_folder(mpi),
        cuda=cuda.nvcc,
        nccl=cuda.nccl,
        compiler=mpi_names.first_line([*(os.environ.get("CXX") or "c++").split(), "--version"]),
        machine=build_horovod.machine_id(),
    )
    wheel = None if rebuild else build_horovod.cached_wheel(cache, target)
    if wheel:
        say(f"horovod: a wheel for this machine is in the cache, {wheel.parent}")
        return wheel
    check_compiler(torch.version)
    check_python_headers()
    check_mpicxx(mpi)
    kind = f"CUDA {cuda.nvcc} and NCCL {cuda.nccl}" if cuda.nvcc else "the CPU"
    say(f"horovod: building {build_horovod.VERSION} for torch {torch.version}, {mpi.version}, {kind}")
    say(f"horovod: {build_horovod.jobs()} compiler processes (4 minutes with two)")
    architectures = cuda_architectures(torch) if cuda.nvcc else ""
    wheel = build_horovod.build(target, cache, cuda.home, cuda.nccl_home, architectures)
    say(f"horovod: built, kept in {wheel.parent}")
    return wheel
