"""The images that a user names on a command line: files, folders, tars, folders of shards, standard input.

In: paths. Out: one `Input` per image in a fixed order: paths as given, folders sorted, shards as in their index.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from shards.errors import InputError
from shards.format.split import BARE, image_member, load_split
from shards.format.tar import TarError, open_tar, refuse_foreign, samples, split_name, window_read
from shards.machine.files import read_file
from shards.read.images import BadImage
from shards.read.samples import Samples
from shards.sources.spellings import is_image, is_stray

STANDARD_INPUT = "-"


@dataclasses.dataclass(frozen=True)
class Input:
    """One image, or why there is none."""

    name: str  # path of the file; of a sample path of the tar, and its key
    data: bytes | np.ndarray = b""  # the file, or uint8 (H, W, 3)
    truth: str = ""  # its class, where shards say so
    problem: str = ""


def inputs(paths: Sequence[str]) -> Iterator[Input]:
    """The images of all paths. What cannot be read comes as an `Input` with a problem.

    Raises:
        InputError: at once, if a path is not there or a folder holds no images; later, if a shard cannot be read.
    """
    parts = [_part(path) for path in paths]
    return (image for part in parts for image in part)


def _part(path: str) -> Iterator[Input]:
    """The images of one path. Raises InputError at once where the path is wrong."""
    if path == STANDARD_INPUT:
        return iter([_standard_input()])
    if os.path.isdir(path):
        if splits := split_names(path):
            return (image for split in splits for image in _of_split(path, split))
        found = list(_files(path))
        if not found:
            tars = any(name.endswith(".tar") for name in os.listdir(path))
            more = f"; python -m shards.index {path} makes an index of its tars" if tars else ""
            raise InputError(f"{path} holds no image files and no index of shards{more}")
        return map(_file, found)
    if not os.path.exists(path):
        raise InputError(f"no such file or folder: {path}")
    if path.endswith(".tar"):
        refuse_foreign(path)
        return _of_tar(path)
    folder, name = os.path.split(path)
    if name.endswith(".json") and name.removesuffix(".json") in split_names(folder or "."):
        return _of_split(folder or ".", name.removesuffix(".json"))
    return map(_file, [path])


def _standard_input() -> Input:
    try:
        return Input("standard input", sys.stdin.buffer.read())
    except OSError as error:
        return Input("standard input", problem=f"cannot be read: {error.strerror}")


def split_names(folder: str) -> list[str]:
    """Names of the splits whose index lies in a folder."""
    found = []
    for name in sorted(os.listdir(folder)):
        if name.endswith(".json") and not is_stray(name):
            try:
                fields = json.loads(read_file(os.path.join(folder, name)))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(fields, dict) and "wids_version" in fields:
                found.append(name.removesuffix(".json"))
    return found


def _files(folder: str) -> Iterator[str]:
    """Image files of a folder and those below it, sorted; links are followed, each folder is entered once."""
    entered = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"cannot list {error.filename}: {error.strerror}")

    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        about = os.stat(where)
        if (about.st_dev, about.st_ino) in entered:
            folders.clear()
            continue
        entered.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not is_stray(name))
        yield from (os.path.join(where, name) for name in sorted(names) if is_image(name))


def _file(path: str) -> Input:
    try:
        return Input(path, read_file(path))
    except OSError as error:
        return Input(path, problem=f"cannot be read: {error.strerror or error}")


def _of_split(folder: str, name: str) -> Iterator[Input]:
    """The samples of a split, with their classes."""
    with Samples(load_split(folder, name)) as found:
        for number, label in enumerate(found.labels.tolist()):
            tar = found.split.path(found.split.shards[found.place(number)[0]].url)
            called = f"{tar}/{found.key(number)}"
            try:
                yield Input(called, found.image(number), truth=found.name(label))
            except BadImage as error:
                yield Input(called, truth=found.name(label), problem=str(error).partition(": ")[2])


def _of_tar(path: str) -> Iterator[Input]:
    """The samples of a tar without its index."""
    damage: list[TarError] = []
    try:
        with open_tar(path) as (read, size):
            for members in samples(window_read(read), size, damage=damage):
                image = image_member(members, "jpeg")
                called = f"{path}/{split_name(members[0].name)[0]}"
                if image is None and any(image_member(members, encoding) for encoding in BARE):
                    raise InputError(f"{path} holds bare pixels, whose size its index knows; give its folder instead")
                if image is None:
                    yield Input(called, problem="no image among its members")
                else:
                    yield Input(called, read(image.offset, image.size))
    except OSError as error:
        yield Input(path, problem=f"cannot be read: {error.strerror or error}")
    for error in damage:
        yield Input(path, problem=error.verdict)
