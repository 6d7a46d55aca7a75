"""Whether Horovod is built with CUDA and NCCL, and where these are."""

import dataclasses
import os
import pathlib
import re
import shutil
import sys

from packages import Torch
from shell import Missing, mpi_names, say


@dataclasses.dataclass(frozen=True)
class Cuda:
    nvcc: str = ""  # version of nvcc; empty: build without CUDA
    home: str = ""
    nccl: str = ""  # version of NCCL's header
    nccl_home: str = ""  # folder of NCCL, if it is not in one of the compiler's default places


def lines(*command: str) -> list[str]:
    """Lines that a command prints; none if it fails."""
    return mpi_names.output(list(command)).splitlines()


def gpu_visible() -> bool:
    return any(pathlib.Path("/dev").glob("nvidia[0-9]*"))


def choose_cuda(choice: str, torch: Torch) -> Cuda:
    """CUDA and NCCL to build with. Raises Missing if they are wanted and something lacks."""
    if choice == "no" or (choice == "auto" and not torch.cuda):
        return Cuda()
    if not torch.cuda:
        raise Missing(f"--cuda yes, but torch {torch.version} is built without CUDA; install a torch with CUDA first")
    home = cuda_home()
    if not home:
        lack = f"torch {torch.version} uses CUDA {torch.cuda}, but no nvcc is on PATH or in CUDA_HOME"
        if choice == "yes" or gpu_visible():
            raise Missing(f"{lack}; module load cuda/{torch.cuda}, or --cuda no to do without GPUs")
        say(f"cuda: {lack}, nor is a GPU here: Horovod for the CPU (run this again where CUDA is)")
        return Cuda()
    version = re.search(r"release (\d+\.\d+)", " ".join(lines(os.path.join(home, "bin", "nvcc"), "--version")))
    nvcc = version[1] if version else ""
    if nvcc.split(".")[0] != torch.cuda.split(".")[0]:
        raise Missing(
            f"nvcc in {home} is CUDA {nvcc}, but torch {torch.version} is built for CUDA {torch.cuda}; module load "
            f"cuda/{torch.cuda}, or --cuda no to do without GPUs"
        )
    header, nccl_home = find_nccl(home)
    if not header:
        raise Missing(
            f"nvcc {nvcc} is here but NCCL is not (nccl.h and libnccl.so); pip install "
            f"nvidia-nccl-cu{nvcc.split('.')[0]}, or apt install libnccl-dev, or module load nccl and set NCCL_HOME; "
            "--cuda no builds without GPUs"
        )
    numbers = re.findall(r"#define\s+NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text(errors="replace"))
    return Cuda(nvcc, home, ".".join(numbers[:3]), nccl_home)


def find_nccl(home: str) -> tuple[pathlib.Path | None, str]:
    """Header of NCCL, and its folder if the compiler has to be told; None if there is no NCCL. `home` is CUDA's."""
    for folder in sys.path:  # torch, and the NCCL that came with it, may lie in an environment below this one
        nccl = pathlib.Path(folder, "nvidia", "nccl")
        if (nccl / "include" / "nccl.h").exists() and (nccl / "lib" / "libnccl.so.2").exists():
            return nccl / "include" / "nccl.h", str(nccl)
    homes = [os.environ.get(name, "") for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME", "NCCL_ROOT", "EBROOTNCCL")]
    for place in [*filter(None, homes), home, "/usr", "/usr/local"]:
        header = pathlib.Path(place, "include", "nccl.h")
        folders = ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu")
        if header.exists() and any(pathlib.Path(place, folder, "libnccl.so").exists() for folder in folders):
            return header, "" if place.startswith("/usr") else place
    return None, ""


def cuda_home() -> str:
    """Folder of the CUDA toolkit, or an empty string."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get(name, "") for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH")]
    if nvcc:
        # nvcc may be a script in another folder; it prints where its toolkit is.
        top = [line.split("TOP=")[1] for line in lines(nvcc, "--dryrun", "-x", "cu", os.devnull) if "TOP=" in line]
        places += [os.path.realpath(place) for place in top] + [str(pathlib.Path(nvcc).resolve().parent.parent)]
    for place in [*places, "/usr/local/cuda"]:
        if place and os.access(os.path.join(place, "bin", "nvcc"), os.X_OK):
            return place
    return ""


def cuda_architectures(torch: Torch) -> str:
    """Compute capabilities to build for, "80,90": those of the GPUs here, or else of torch, that nvcc supports."""
    names = [name.strip() for name in lines("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")]
    here = {name.replace(".", "") for name in names if re.fullmatch(r"\d+\.\d+", name)}
    nvcc = os.path.join(cuda_home(), "bin", "nvcc")
    known = {line.strip().removeprefix("compute_") for line in lines(nvcc, "--list-gpu-arch")}
    return ",".join(sorted(known & (here or {arch for arch in torch.archs if arch.isdigit()}), key=int))
