"""Folders for what is compiled once and kept, and whether programs can be compiled here at all.

In: the environment. Out: a cache folder that can be written (the user's own, else one on this node), and the reason
when Triton could not compile its kernels here.
"""

import functools
import os
import shlex
import shutil
import stat
import subprocess
import sysconfig
import tempfile

from shards.machine.facts import file_system

_COMPILE_SECONDS = 60.0
_STALE_HANDLES = ("nfs", "nfs4")  # file systems on which a node gets "stale file handle" while another replaces a file


def problem_with(folder: str) -> str:
    """Why compiled libraries cannot be kept in `folder` and loaded from it; empty: they can. Creates the folder."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        about = os.stat(folder)
        if about.st_uid not in (os.getuid(), 0) or about.st_mode & stat.S_IWOTH:
            return f"{folder} can be written by other users"
        with tempfile.TemporaryFile(dir=folder):
            pass
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            return f"{folder} is mounted noexec"
    except OSError as error:
        return f"{folder} cannot be written: {error.strerror or error}"
    return ""


def node_folder(name: str) -> str:
    """This user's folder `name` on this node, in $TMPDIR or /tmp."""
    return os.path.join(tempfile.gettempdir(), f"alexnet-horovod-{os.getuid()}-{name}")


def cache_folder(wanted: str, name: str) -> str:
    """`wanted`, or, if it cannot be used, the folder `name` on this node."""
    return node_folder(name) if problem_with(wanted) else wanted


@functools.cache
def triton_cache() -> str:
    """The folder for Triton's compiled kernels, also put into TRITON_CACHE_DIR.

    It is the user's TRITON_CACHE_DIR, else ~/.triton/cache. If the home folder cannot be written, or is on NFS, where
    nodes that replace each other's files get stale file handles, it is a folder on this node.
    """
    given = os.environ.get("TRITON_CACHE_DIR")
    if not given:
        home = os.path.expanduser(os.environ.get("TRITON_HOME") or "~")
        wanted = os.path.join(home, ".triton", "cache")
        if file_system(home) in _STALE_HANDLES:
            wanted = node_folder("triton")
        os.environ["TRITON_CACHE_DIR"] = given = cache_folder(wanted, "triton")
    return given


@functools.cache
def triton_lacks() -> str:
    """What Triton lacks here to compile and keep kernels; empty: nothing. Chooses its cache folder."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")  # in Triton's order
    if not compiler:
        return "Triton needs a C compiler (gcc, clang, or CC=PATH), and there is none on this node"
    scheme = sysconfig.get_default_scheme()
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    command = [*shlex.split(compiler), "-fsyntax-only", "-x", "c", f"-I{include}", "-"]
    try:
        done = subprocess.run(
            command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=_COMPILE_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"Triton needs a C compiler, but {compiler} does not run: {error}"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        return f"Triton needs a C compiler and Python's headers; {compiler}: {lines[0]}"
    problem = problem_with(triton_cache())
    return f"Triton has no place for its kernels ({problem}); set TRITON_CACHE_DIR" if problem else ""
