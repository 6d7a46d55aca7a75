"""Checks what a build of Horovod needs: a C++ and a C compiler, and Python's headers."""

import os
import pathlib
import subprocess
import sys
import sysconfig
import tempfile

import build_horovod
from shell import Missing, mpi_names, on_path


def check_compiler(torch_version: str) -> str:
    """First line of the C++ compiler's version. Raises Missing if no compiler can build Horovod for this torch."""
    compiler = os.environ.get("CXX") or next(filter(None, map(on_path, ("c++", "g++", "clang++"))), "")
    if not compiler:
        raise Missing(
            "no C++ compiler on PATH, and Horovod is built from source; apt install g++, or module load gcc, or conda "
            "install gxx"
        )
    if not (os.environ.get("CC") or any(map(on_path, ("cc", "gcc", "clang")))):
        raise Missing("no C compiler on PATH (gcc); apt install gcc, or module load gcc")
    standard = f"c++{build_horovod.cxx_standard(torch_version)}"
    reason = why_not([*compiler.split(), f"-std={standard}"], "#include <string>\n#include <optional>\nint main() {}\n")
    if reason:
        raise Missing(
            f"the C++ compiler {compiler} does not compile {standard} ({reason}); load or install a newer one: apt "
            "install g++, or module load gcc (9 or later)"
        )
    return mpi_names.first_line([*compiler.split(), "--version"])


def check_python_headers() -> None:
    """Raises Missing if this Python has no headers."""
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise Missing(
            f"{header} is missing: this Python has no headers; apt install python{version}-dev, or use a Python of "
            "conda, pyenv or a module"
        )


def why_not(compiler: list[str], source: str) -> str:
    """Why a C++ program does not compile and link, in one line; an empty string if it does."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "main.cc")
        path.write_text(source)
        command = [*compiler, str(path), "-o", os.path.join(folder, "main")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.splitlines()
    errors = [line for line in lines if "error" in line or "cannot" in line or "not found" in line]
    return (errors or lines or ["it fails"])[0].strip()
