"""Decodes parts of JPEG images by jpeg.c, which is compiled once per kind of machine and kept in the user's cache.

In: the bytes of a file and a rectangle. Out: its pixels in memory of the caller, equal to libjpeg-turbo's, or the
answer that another decoder is needed. Without a C compiler, or AVX2 (x86-64), this decoder is missing.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import threading

from shards.machine.caches import cache_folder

_SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "jpeg.c")
_FLAGS = ("-O3", "-mavx2", "-mbmi2", "-shared", "-fPIC")
_PROCESSOR = {"avx2", "bmi2"}  # flags in /proc/cpuinfo that the processor must have
_COMPILE_SECONDS = 120.0

_DONE = 0  # as in jpeg.c


class _Missing(Exception):
    """The decoder is missing here. The message says why."""


@functools.cache
def _find() -> tuple[ctypes.CDLL | None, str]:
    """The library, which is compiled if necessary, or None and the reason why it is missing."""
    try:
        _check_processor()
        path = library_path()
        if not os.path.exists(path):
            _compile(path)
        if os.stat(path).st_uid not in (os.getuid(), 0):
            raise _Missing(f"{path} belongs to somebody else")
        library = ctypes.CDLL(path)
    except (_Missing, OSError, subprocess.SubprocessError) as error:
        return None, " ".join(str(error).split())
    number, size, pointer = ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p
    library.jpeg_new.restype = pointer
    library.jpeg_free.argtypes = [pointer]
    library.jpeg_free.restype = None
    library.jpeg_crop.argtypes = [pointer, pointer, size, *[number] * 6, pointer, ctypes.c_ssize_t]
    return library, ""


def missing() -> str:
    """Why the decoder is missing here; empty: it is not. The first call may compile it (about 3 s)."""
    return _find()[1]


class Decoder:
    """Decodes one image after another; not for use by several threads at once.

    Raises:
        RuntimeError: the decoder is missing here.
    """

    def __init__(self):
        library, reason = _find()
        if library is None:
            raise RuntimeError(reason)
        self._crop = library.jpeg_crop
        self._free = library.jpeg_free
        self._state = library.jpeg_new()
        if not self._state:
            raise MemoryError("no memory for a JPEG decoder")

    def crop(
        self,
        data: bytes | memoryview,
        size: tuple[int, int],
        corner: tuple[int, int],
        part: tuple[int, int],
        address: int,
    ) -> bool:
        """Write the RGB pixels of a part of an image to a memory address, row by row.

        Args:
            data: bytes of the file.
            size: height, width of the whole image.
            corner: top, left of the part.
            part: height, width of the part.

        Returns:
            False: another decoder is needed, because the file is damaged or unusual or the image has another size.
            The memory at the address then holds no valid pixels.
        """
        if isinstance(data, memoryview) and not data.readonly:
            pointer = ctypes.byref(ctypes.c_char.from_buffer(data))
        else:
            pointer = data = bytes(data)
        done = self._crop(self._state, pointer, len(data), *size, *corner, *part, address, 3 * part[1])
        return done == _DONE

    def __del__(self):
        if getattr(self, "_state", None):
            self._free(self._state)


_thread = threading.local()


def decoder() -> Decoder | None:
    """The decoder of this thread; None: it is missing here."""
    if not hasattr(_thread, "decoder"):
        _thread.decoder = Decoder() if _find()[0] is not None else None
    return _thread.decoder


def _check_processor() -> None:
    if platform.machine() != "x86_64":
        raise _Missing(f"it needs x86-64, this is {platform.machine()}")
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), [])
    except OSError:
        flags = []
    lacking = _PROCESSOR.difference(flags)
    if lacking:
        raise _Missing(f"this processor has no {' and no '.join(sorted(lacking))}")


def library_path() -> str:
    """Where the compiled library is kept. Its name differs for kinds of machines that may share a home folder."""
    with open(_SOURCE, "rb") as file:
        source = file.read()
    about = repr((_FLAGS, platform.machine(), platform.libc_ver()))
    key = hashlib.sha256(source + about.encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.environ.get("HOME") or "/tmp", ".cache")
    wanted, name = os.path.join(home, "alexnet-horovod"), f"jpeg-{key}.so"
    made = os.path.join(wanted, name)  # perhaps by another node, and this one can only read it
    return made if os.path.exists(made) else os.path.join(cache_folder(wanted, "jpeg"), name)


def _compile(path: str) -> None:
    """Compile the library, then rename it; processes that start together wait for the first one."""
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "jpeg.lock"), "w") as lock:
        with contextlib.suppress(OSError):  # without locks each process compiles, and the last library stays
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix="jpeg-") as scratch:
            made = os.path.join(scratch, "jpeg.so")
            command = [*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS, "-o", made, _SOURCE]
            try:
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_COMPILE_SECONDS
                )
            except FileNotFoundError:
                raise _Missing(f"there is no compiler {command[0]!r}") from None
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
                raise _Missing(f"{command[0]} cannot compile {_SOURCE}: {lines[0] if lines else done.returncode}")
            os.replace(made, path)
