"""Facts about this machine that results are reported with: processor, versions of packages, file systems.

In: nothing, or a path. Out: short texts.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import platform

from shards import ROOT
from shards.machine.cores import cores_given
from shards.machine.files import is_remote


def cpu_name() -> str:
    """Model of the processor."""
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo", encoding="utf-8") as file:
        return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    return platform.processor() or platform.machine()


def cpu_and_cores() -> str:
    """Model of the processor, and how many cores this process may use: `AMD EPYC 9654, 16 cores`."""
    return f"{cpu_name()}, {cores_given().count} cores"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those of these packages that are installed; by default of those that touch images."""
    found = {"python": platform.python_version()}
    for package in packages or ("torch", "numpy", "pillow", "simplejpeg", "webdataset"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def code_version() -> str:
    """A short hash of all source files of the project."""
    digest = hashlib.sha256()
    for room in ("job", "shards"):
        for folder, folders, names in os.walk(os.path.join(ROOT, room)):
            folders.sort()
            for name in sorted(names):
                if name.endswith((".py", ".c")):
                    with open(os.path.join(folder, name), "rb") as file:
                        digest.update(name.encode() + file.read())
    return digest.hexdigest()[:12]


def network_links() -> list[str]:
    """InfiniBand ports and network interfaces that are up, with the speed they report."""
    found = []
    for folder, rate in (("/sys/class/infiniband", "ports/1/rate"), ("/sys/class/net", "speed")):
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            try:
                with open(os.path.join(folder, name, rate), encoding="ascii") as file:
                    speed = file.read().strip()
            except OSError:  # an interface that is down or reports no speed
                continue
            if rate != "speed" or speed not in ("", "-1"):
                found.append(f"{name} {speed} Mbit/s" if rate == "speed" else f"{name} {speed}")
    return found


def file_system(path: str) -> str:
    """Kind of the file system that holds `path`: "ext4", "nfs4", "lustre"; of a URL its scheme."""
    if is_remote(path):
        return path.partition("://")[0]
    path, kind, best = os.path.realpath(path), "unknown", -1
    with open("/proc/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            point, this = line.split(" ")[1:3]
            point = point.replace("\\040", " ")
            if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= best:
                kind, best = this, len(point)
    return kind
