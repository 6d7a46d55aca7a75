"""Copy the shards that training reads to this node's own disk: python slurm/lib/stage.py DATA DEST

In: a folder with train.json and val.json. Out: DEST with these, and all the files that they name, wherever those lie;
what is there with the same size and time is kept. Every node needs all shards, because each epoch deals them out anew.
Exit codes: 0 copied, 2 a file is missing, 3 the disk is too small.
"""

import argparse
import concurrent.futures
import errno
import fcntl
import json
import os
import shutil
import socket
import sys
import threading

from shards.command import Parser, run
from shards.errors import InputError
from shards.format.split import idx_path, load_fields, parse_split
from shards.machine.files import is_remote, write_whole
from shards.machine.progress import Progress

STREAMS = 8  # files at a time: a single one does not fill a parallel file system
CHUNK = 8 << 20
EXIT_NO_ROOM = 3
GIB = 1 << 30


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python slurm/lib/stage.py", description="Copy shards to this node's own disk, for STAGE=1.")
    p.add_argument("data", metavar="DATA", help="folder of shards")
    p.add_argument("dest", metavar="DEST", help="folder on the node's own disk")
    return p


def main() -> int:
    arguments = parser().parse_args()
    host = socket.gethostname()
    indexes, files = plan(arguments.data)
    try:
        os.makedirs(arguments.dest, exist_ok=True)
        if os.stat(arguments.dest).st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user")
        with open(os.path.join(arguments.dest, ".lock"), "a") as lock:
            _wait_for_turn(lock, f"{arguments.dest} on {host}")
            code = copy(files, arguments.dest, host)
            if code == 0:
                for name, data in indexes.items():
                    _write(os.path.join(arguments.dest, name), data)
            return code
    except OSError as error:
        reason = f"cannot copy {arguments.data} to {arguments.dest} on {host}: {error}"
        raise InputError(f"{reason}; SCRATCH in slurm/site.sh names another disk", everywhere=False) from None


def plan(data: str) -> tuple[dict[str, bytes], dict[str, str]]:
    """What DEST is to hold: the index files with their bytes, and for each other file's place there its path here.

    Files outside DATA (an index made with --out, a path with ..) get a place inside DEST, and the index names that.
    """
    indexes, files = {}, {}
    for name in ("train", "val"):
        if name == "val" and not os.path.exists(os.path.join(data, "val.json")):
            continue
        fields = load_fields(data, name)
        split = parse_split(fields, name, data, f"{data}/{name}.json")

        def place(file: str, split=split) -> str:
            if is_remote(file):
                return file
            inside = os.path.normpath(file)
            if os.path.isabs(inside) or inside.startswith(".."):
                inside = "outside" + os.path.abspath(split.path(file))
            files[inside] = split.path(file)
            return inside

        for shard, entry in zip(split.shards, fields["shardlist"], strict=True):
            idx = place(shard.idx or idx_path(shard.url))
            entry["url"] = place(shard.url)
            if shard.idx:
                entry["idx"] = idx
        for key in ("mean", "labels", "crc32"):
            if fields.get(key):
                fields[key] = place(fields[key])
        indexes[f"{name}.json"] = (json.dumps(fields, indent=1) + "\n").encode()
    return indexes, files


def copy(files: dict[str, str], dest: str, host: str) -> int:
    """Bring the files to their places below `dest`; the exit code."""
    todo, total = [], 0
    for inside, source in files.items():
        try:
            wanted = os.stat(source)  # follows links
        except OSError as error:
            raise InputError(f"cannot stage {source}: {error.strerror}; restore it, or index the shards anew") from None
        target = os.path.join(dest, inside)
        if not _same(target, wanted):
            todo.append((source, target, wanted))
            total += wanted.st_size
    free = shutil.disk_usage(dest).free
    if total > free:
        return _no_room(dest, host, f"{total / GIB:.1f} GiB to copy, {free / GIB:.1f} GiB free")
    counter = Counter(total)
    with concurrent.futures.ThreadPoolExecutor(STREAMS) as pool:
        running = [pool.submit(_copy_file, *task, counter) for task in todo]
        try:
            for future in concurrent.futures.as_completed(running):
                future.result()
        except BaseException as error:
            counter.stop = True
            pool.shutdown(cancel_futures=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                return _no_room(dest, host, error.strerror)
            raise
    return 0


class Counter:
    """Bytes copied so far; the first node shows them."""

    def __init__(self, total: int):
        self.done, self.stop = 0, False
        self._lock = threading.Lock()
        first = os.environ.get("SLURM_PROCID", "0") == "0"
        self._progress = Progress(total >> 20, "MiB", "copying shards") if first else None

    def add(self, count: int) -> None:
        with self._lock:
            before, self.done = self.done >> 20, self.done + count
            if self._progress:
                self._progress.add((self.done >> 20) - before)


def _copy_file(source: str, target: str, wanted: os.stat_result, counter: Counter) -> None:
    part = f"{target}.part"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        with open(source, "rb", buffering=0) as reader, open(part, "wb", buffering=0) as writer:
            while data := reader.read(CHUNK):
                if counter.stop:
                    raise InterruptedError
                view = memoryview(data)
                while view:
                    view = view[writer.write(view) :]
                counter.add(len(data))
        os.utime(part, ns=(wanted.st_atime_ns, wanted.st_mtime_ns))
        os.replace(part, target)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise


def _same(target: str, wanted: os.stat_result) -> bool:
    try:
        there = os.stat(target)
    except OSError:
        return False
    # Whole seconds: not every file system keeps the rest.
    return there.st_size == wanted.st_size and int(there.st_mtime) == int(wanted.st_mtime)


def _wait_for_turn(lock, where: str) -> None:
    """Another job on this node may be copying the same data: wait for it; then there is nothing left to copy."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another job is copying to {where}; waiting for it", flush=True)
        fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass


def _no_room(dest: str, host: str, why: str) -> int:
    print(f"warning: no room in {dest} on {host}: {why}", file=sys.stderr, flush=True)
    return EXIT_NO_ROOM


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "rb") as file:
            if file.read() == data:
                return
    except FileNotFoundError:
        pass
    write_whole(path, data)


if __name__ == "__main__":
    os.umask(0o077)  # the disk is shared with other users
    run(main)
