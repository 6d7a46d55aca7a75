"""Files, local and remote: read whole, written whole or not at all."""

import errno
import os
import stat

from shards.errors import InputError

REMOTE_SCHEMES = ("http", "https", "s3", "gs")


def is_remote(path: str) -> bool:
    """Whether a path is a URL (see REMOTE_SCHEMES)."""
    return path.partition("://")[0].lower() in REMOTE_SCHEMES and "://" in path


def read_file(path: str) -> bytes:
    """The bytes of a small file, local or remote. Raises OSError (FileNotFoundError) or, for a URL, InputError."""
    if is_remote(path):
        from shards.machine import remote

        return remote.read_file(path)
    check_regular(path)
    with open(path, "rb") as file:
        return file.read()


def check_regular(path: str) -> None:
    """Raise OSError unless a path is that of a regular file: reading a pipe or a device might never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {'a folder, ' if stat.S_ISDIR(mode) else ''}not a file", path)


def sync_folder(folder: str) -> None:
    """Flush the renames in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str) -> None:
    """Raise InputError unless a file can be written at `path`: before the work whose result it is to hold."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder; give the name of a file")
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"cannot write {path}: {folder} is not a folder that can be written")


def write_whole(path: str, data: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it: never half a file under `path`."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
