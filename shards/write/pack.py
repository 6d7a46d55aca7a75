"""Packs a source into DEST: finds its splits, plans them, packs what is left to do, and finishes them.

In: what the command line says. Out: the data set in DEST, and what was done on stdout. Under MPI this is rank 0.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from shards.errors import InputError
from shards.format.names import STATE
from shards.machine.cores import cores_given
from shards.machine.lock import hold
from shards.machine.progress import Progress
from shards.sources.find import find
from shards.sources.items import Items, without_table
from shards.write.finish import finish, first_bad
from shards.write.plan import prepare, remaining
from shards.write.pool import WorkerError, pack_all
from shards.write.shard import Options, Packing, ShardId, ShardRecord, write_error

TOO_MANY_BAD = 1000  # unreadable images beyond --max-bad at which packing stops: SOURCE is not what it seems
_SHOWN_ENDINGS = 5  # of files that are not images


def pack(
    options: Options,
    comm,
    source: str,
    dest: str,
    split: str = "",
    labels: str = "",
    workers: int | None = None,
    max_bad: int = 0,
) -> int:
    """Pack everything; the exit code.

    Args:
        comm: MPI communicator of which this is rank 0; None: this is the only process.
        split: name of the only split, or the only one to pack.
        labels: file of labels (see shards.sources.labels).
        workers: processes; None: one per core.
        max_bad: images that may be left out.

    Raises:
        InputError: SOURCE or DEST cannot be used, or too many images cannot be decoded.
    """
    waiting = comm is not None  # the other ranks wait for their packings, or None
    try:
        found = find(source, split, labels)
        dest = dest.rstrip("/") or "/"
        _check_apart(source, found, dest)
        try:
            os.makedirs(os.path.join(dest, STATE), exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder {dest}: {error.strerror}") from None
        with lock(dest):
            with _writing(dest):
                packings = [prepare(items, dest, options) for items in found]
            todo, records = remaining(packings)
            if todo:
                waiting = False  # pack_all sends the packings, and whatever happens then tells the ranks to stop
                _pack_shards(packings, todo, records, workers or cores_given().count, max_bad, comm)
            with _writing(dest):
                finish(packings, records, max_bad, bool(todo))
        return 0
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if waiting:
            comm.bcast(None)


@contextlib.contextmanager
def _writing(dest: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(dest, error) from None


def lock(dest: str) -> TextIO:
    """Only one pack at a time in DEST, until the file that this returns is closed, or this process ends."""
    try:
        return hold(os.path.join(dest, STATE, "lock"), dest, "DEST")
    except OSError as error:
        raise InputError(f"cannot write to {dest}: {error.strerror}") from None


def _check_apart(source: str, found: list[Items], dest: str) -> None:
    """DEST among the class folders would be taken for a class when the command is given again."""
    there = os.path.realpath(dest)
    if os.path.realpath(source) == there:
        raise InputError("SOURCE and DEST are the same folder")
    for path in (path for items in found for path in items.files if os.path.isdir(path)):
        if os.path.commonpath([os.path.realpath(path), there]) == os.path.realpath(path):
            raise InputError(f"DEST {dest} lies among the class folders of {path}; choose a folder outside it")


def _pack_shards(
    packings: list[Packing],
    todo: list[ShardId],
    records: dict[ShardId, ShardRecord],
    workers: int,
    max_bad: int,
    comm,
) -> None:
    """Pack the shards `todo`, show how far it is, and add their records."""
    total = sum(packing.nsamples for packing in packings)
    bounds = [packings[shard.packing].bounds(shard.shard) for shard in todo]
    done, bad = total - sum(last - first for first, last in bounds), 0
    _print_plan(packings, len(todo), done)
    splits = dict.fromkeys(packings[shard.packing].items.split for shard in todo)
    progress = Progress(total, what=f"packing {' and '.join(splits)}", done=done)

    def on_record(shard: ShardId, record: ShardRecord) -> None:
        nonlocal bad
        records[shard] = record
        bad += len(record.bad)
        if bad > max_bad + TOO_MANY_BAD:
            raise InputError(f"{bad:,} images cannot be decoded, {first_bad(records)}; is this the source?")

    light = [dataclasses.replace(packing, items=without_table(packing.items)) for packing in packings]
    try:
        pack_all(light, todo, workers, comm, progress.add, on_record)
    finally:
        progress.close()


def _print_plan(packings: list[Packing], shards: int, done: int) -> None:
    """Print what is to be packed. `shards`: still to be packed; `done`: images that an earlier run packed."""
    for packing in packings:
        items, classes = packing.items, len(packing.items.classes)
        print(f"{items.split}: {packing.nsamples:,} images of {classes:,} classes for {packing.nshards:,} shards")
        if items.left_out:
            most = sorted(items.left_out, key=items.left_out.get, reverse=True)[:_SHOWN_ENDINGS]
            kinds = ", ".join(f"{items.left_out[ending]:,} {ending}" for ending in most)
            print(f"  note: {sum(items.left_out.values()):,} files are no images by their names: {kinds}")
        empty = classes - len(np.unique(items.table["label"]))
        if empty:
            hint = "" if 0 in items.table["label"] else "; labels count from 0"
            print(f"  note: {empty:,} classes have no image{hint}")
    if done:
        print(f"carrying on: {done:,} images are packed already, {shards:,} shards remain")
    sys.stdout.flush()
