"""Builds a wheel of Horovod 0.28.1 that works with current versions of PyTorch, compilers and MPIs, and caches it.

In: what the machine has (`Target`). Out: the path of a wheel in the user's cache, built once for each target.
Horovod's released sources are changed by patches/*.patch; each of them says at its top why.
"""

import dataclasses
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile

from packages import SETUP
from shell import PIP, Failed, Missing, run

VERSION = "0.28.1"  # the newest release (2023)
PATCHES = pathlib.Path(__file__).resolve().parent / "patches"

# Standard headers that g++ 13 no longer includes through others, and that Horovod and its third_party rely on.
HEADERS = "string stdexcept cstdint memory functional vector unordered_map mutex thread".split()

# Tools of the build. They are installed into a temporary folder, so that the user's environment does not change.
# setuptools 81 removed what Horovod's setup.py uses, and that imports what Horovod needs.
BUILD_TOOLS = ["setuptools<81", "wheel", *SETUP["HOROVOD_REQUIRES"]]
CMAKE_TOOLS = ["cmake>=3.22", "ninja"]  # only where cmake or make is missing


def cxx_standard(torch_version: str) -> int:
    """C++ standard that the headers of this torch need."""
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    return 20 if (major, minor) >= (2, 14) else 17


def patch_command() -> list[str]:
    """The command that applies a patch given as its last argument. Raises Missing if there is none."""
    if shutil.which("git"):
        return ["git", "apply", "--whitespace=nowarn"]
    if shutil.which("patch"):
        return ["patch", "--strip=1", "--batch", "--forward", "--fuzz=0", "--input"]
    raise Missing(
        "no git and no patch on PATH, and Horovod's sources are patched; apt install patch, or module load git"
    )


def apply_patches(source: pathlib.Path) -> None:
    """Apply patches/*.patch to Horovod's sources in `source`. Raises Failed if one does not apply."""
    # git must not take a repository around the build folder, or the user's settings, into account.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CEILING_DIRECTORIES": str(source.resolve().parent), "GIT_CONFIG_GLOBAL": os.devnull}
    for file in sorted(PATCHES.glob("*.patch")):
        done = subprocess.run(
            [*patch_command(), str(file)], cwd=source, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode:
            reason = " ".join((done.stderr or done.stdout).split())
            raise Failed(f"{file.name} does not apply to the sources of Horovod {VERSION}: {reason}")


def patch_hash() -> str:
    """Eight hex digits that change with the patches."""
    digest = hashlib.sha256(repr((VERSION, HEADERS)).encode())
    for file in sorted(PATCHES.glob("*.patch")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


@dataclasses.dataclass(frozen=True)
class Target:
    """Everything that a built Horovod depends on. A wheel is reused only if all fields are equal."""

    python: str  # cache tag of the interpreter, "cpython-311"
    torch: str  # version with its local part, "2.13.0+cu130"
    cxx11_abi: bool
    mpi: str  # kind, name and version, "wheel Open MPI 5.0.11"
    mpi_libraries: str = ""  # folder of the machine's libmpi, where it is known
    cuda: str = ""  # version of nvcc; empty: a build without CUDA
    nccl: str = ""  # version of the NCCL header
    compiler: str = ""  # first line of c++ --version
    machine: str = ""  # architecture, C library and vector extensions


def key(target: Target) -> str:
    """Eight hex digits that change with anything in `target` and with the patches."""
    text = repr((dataclasses.astuple(target), patch_hash()))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def local_version(target: Target) -> str:
    """Local part of the wheel's version: it marks the wheel as ours and names its patches."""
    return f"alexnet.p{patch_hash()}.k{key(target)}"


def machine_id() -> str:
    """Architecture, C library, and the vector extensions that Horovod's build enables if the CPU has them."""
    try:
        words = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    extensions = " ".join(name for name in ("avx", "fma", "f16c") if name in words)
    return f"{platform.machine()} {' '.join(platform.libc_ver())} {extensions}"


def cached_wheel(cache: pathlib.Path, target: Target) -> pathlib.Path | None:
    """The wheel for `target` in the cache, or None."""
    found = sorted((cache / "wheels" / key(target)).glob("horovod-*.whl"))
    return found[0] if found else None


def jobs() -> int:
    """Number of compiler processes: limited by the cores of this process and by memory (torch's headers take 2 GiB)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(len(os.sched_getaffinity(0)), int(memory / 2.5), 16))


def build_environment(target: Target, tools: pathlib.Path, cuda_home: str, nccl_home: str, cuda_arch: str) -> dict:
    """Environment variables of the build. `tools` is the folder that BUILD_TOOLS were installed into."""
    rpath = ["$ORIGIN/../../torch/lib", "$ORIGIN/../../nvidia/nccl/lib"]  # from site-packages/horovod/torch
    if target.mpi.startswith("wheel"):
        rpath.append("$ORIGIN/../../../..")  # PyPI's libmpi lies in the lib folder of the environment
    elif target.mpi_libraries:
        rpath.append(target.mpi_libraries)
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HOROVOD_", "PIP_TARGET"))}
    env |= {
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_LOCAL_VERSION": local_version(target),
        "HOROVOD_RPATH": ";".join(rpath),
        "HOROVOD_CXX_STANDARD": str(cxx_standard(target.torch)),
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 rejects the projects in third_party otherwise
        "CXXFLAGS": " ".join([os.environ.get("CXXFLAGS", "")] + [f"-include {name}" for name in HEADERS]).strip(),
        "LDFLAGS": f"{os.environ.get('LDFLAGS', '')} -s".strip(),  # -s: no debug symbols, 1 MB instead of 60
        "MAKEFLAGS": f"-j{jobs()}",
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs()),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tools), os.environ.get("PYTHONPATH")])),
        "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    if not shutil.which("make"):
        env["CMAKE_GENERATOR"] = "Ninja"
    if target.cuda:
        env |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL",
            "HOROVOD_NCCL_LINK": "SHARED",
            # The nvcc on PATH may be a script in another folder, but CMake and torch look for the toolkit beside it.
            "CUDA_HOME": cuda_home,
            "HOROVOD_CUDA_HOME": cuda_home,
            "CUDACXX": f"{cuda_home}/bin/nvcc",
            "PATH": f"{cuda_home}/bin{os.pathsep}{env['PATH']}",
        }
        if nccl_home:
            env["HOROVOD_NCCL_HOME"] = nccl_home
        if cuda_arch:
            env["HOROVOD_BUILD_CUDA_CC_LIST"] = cuda_arch
    return env


def nccl_folder(source: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Make `folder` with `include` and `lib/libnccl.so` from pip's NCCL in `source`, which has libnccl.so.2 only."""
    (folder / "lib").mkdir(parents=True)
    (folder / "include").symlink_to(source / "include")
    (folder / "lib" / "libnccl.so").symlink_to(source / "lib" / "libnccl.so.2")
    return folder


def keep(file: pathlib.Path, place: pathlib.Path) -> None:
    """Copy `file` to `place`; the name appears only when the copy is complete."""
    partial = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.copyfile(file, partial)
    os.replace(partial, place)


def unpack(sdist: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Unpack Horovod's sources into `folder`. Returns the folder of the sources."""
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **safely)
    return folder / f"horovod-{VERSION}"


def download(cache: pathlib.Path, work: pathlib.Path, tools: pathlib.Path) -> pathlib.Path:
    """Horovod's released sources, from the cache or PyPI. `tools` is the folder of BUILD_TOOLS."""
    sdist = cache / f"horovod-{VERSION}.tar.gz"
    if not sdist.exists():
        run(
            [*PIP, "download", "--no-binary", "horovod", "--no-deps", "--no-build-isolation", "--dest", str(work)]
            + [f"horovod=={VERSION}"],
            "download Horovod's sources",
            env=os.environ | {"PYTHONPATH": str(tools)},
        )
        keep(work / sdist.name, sdist)
    return sdist


def build(target: Target, cache: pathlib.Path, cuda_home: str, nccl_home: str, cuda_arch: str) -> pathlib.Path:
    """Build the wheel for `target`, put it into `cache`, and return its path.

    Args:
        cuda_home: folder of the CUDA toolkit; this and the next two are empty in a build without CUDA.
        nccl_home: folder of NCCL; empty if the compiler finds it by itself.
        cuda_arch: compute capabilities to compile for, "80,90".

    Raises:
        Missing, Failed: see shell.run.
    """
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as folder:
        work = pathlib.Path(folder)
        tools = work / "tools"
        missing = [] if shutil.which("cmake") and shutil.which("make") else CMAKE_TOOLS
        run([*PIP, "install", "--target", str(tools), *BUILD_TOOLS, *missing], "download the build tools")
        source = unpack(download(cache, work, tools), work)
        apply_patches(source)
        if nccl_home and not list(pathlib.Path(nccl_home).glob("lib*/**/libnccl.so")):
            nccl_home = str(nccl_folder(pathlib.Path(nccl_home), work / "nccl"))
        run(
            [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(work / "dist")],
            "compile Horovod",
            cwd=source,
            env=build_environment(target, tools, cuda_home, nccl_home, cuda_arch),
        )
        wheel = next((work / "dist").glob("horovod-*.whl"))
        home = cache / "wheels" / key(target)
        home.mkdir(parents=True, exist_ok=True)
        (home / "target.txt").write_text(f"{target}\n")
        keep(wheel, home / wheel.name)
        return home / wheel.name
