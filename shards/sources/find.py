"""What can be packed: class folders, IDX files, ILSVRC archives, WebDataset shards.

In: a path. Out: one `Items` a split, in an order that depends on the names alone, so that a folder and an archive of
the same images are packed to the same bytes. Nothing is unpacked here, and of an archive only headers are read.
"""

import gzip
import os
import struct
import zlib

import numpy as np

from shards.errors import InputError
from shards.format.split import image_member, load_labels, load_split, read_idx
from shards.machine.files import is_remote
from shards.sources import ilsvrc
from shards.sources.folders import find_in_folders, holds_classes, only_folder, split_folders
from shards.sources.items import Items, Rows
from shards.sources.spellings import is_filler, is_stray

_IDX_PARTS = {"train": "train", "t10k": "val"}


def find(source: str, split: str = "", labels: str = "") -> list[Items]:
    """Everything in `source` that can be packed, the train split first.

    `split`: name for a source that holds one split, or the only one to be packed of a source that holds several.
    `labels`: labels of images that lie in no class folder (see shards.sources.labels).

    Raises:
        InputError: nothing to pack in it, unreadable, or labels missing.
    """
    if not os.path.exists(source):
        raise InputError(f"no such file or folder: {source}")
    try:
        if os.path.isdir(source):
            found = _find_in_folder(source.rstrip("/") or "/", split, labels)
        else:
            found = ilsvrc.read_archives({split: source}, labels)
    except PermissionError as error:
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from None
    except OSError as error:
        raise InputError(f"cannot read {error.filename or source}: {error.strerror or error}") from None
    if split and len(found) > 1:
        found = [items for items in found if items.split == split]
        if not found:
            raise InputError(f"{source} holds no split {split!r}; --split names one of those it holds")
    for items in found:
        if not len(items.table):
            raise InputError(f"no images for split {items.split!r} in {source}")
        if len(items.classes) <= int(items.table["label"].max()):
            raise InputError(
                f"{source} has labels up to {items.table['label'].max()}, but {len(items.classes)} classes"
            )
    return sorted(found, key=lambda items: (items.split != "train", items.split))


def _find_in_folder(source: str, split: str, labels: str) -> list[Items]:
    names = set(os.listdir(source))
    archives = ilsvrc.find_archives(source)
    folders = split_folders(source, labels)
    unpacked = set(folders) & {"train", "val"}
    if archives and not unpacked <= set(archives) and not set(archives) < unpacked:
        raise InputError(
            f"{source} holds both {os.path.basename(min(archives.values()))} and the folder "
            f"{folders[min(unpacked)][0]}; pack them one by one into the same DEST, the folder with --split"
        )
    if archives and unpacked:
        beside = ("folders", "archives") if set(archives) < unpacked else ("archives", "folders")
        print(f"note: the {beside[0]} in {source} are packed, the {beside[1]} beside them not")
    if archives and not set(archives) < unpacked:
        if split and len(archives) == 1:
            archives = {split: next(iter(archives.values()))}
        return ilsvrc.read_archives(archives, labels)
    idx = [prefix for prefix in _IDX_PARTS if _idx_file(source, f"{prefix}-images", 3)]
    shards = any(name.endswith(".labels.npy") for name in names)
    if labels and (idx or shards):
        raise InputError(f"--labels is for images in no class folder; {source} holds labels of its own")
    if idx:
        return _idx(source, idx, split)
    if shards:
        return _webdataset(source, sorted(names))
    if not folders and any(name.endswith(".tar") for name in names):
        raise InputError(f"the shards in {source} have no index; make it with python -m shards.index {source}")
    inner = next((path for f in ilsvrc.KAGGLE_FOLDERS if os.path.isdir(path := os.path.join(source, f))), "")
    if not inner and not folders:
        inner = _wrapped(source)
    if inner:
        print(f"note: packing {inner}")
        return _find_in_folder(inner, split, labels)
    return find_in_folders(source, split, labels)


def _wrapped(source: str, inner: bool = False) -> str:
    """The folder to pack in one that holds only that, as SOURCE/dataset/train/..., or an empty string."""
    with os.scandir(source) as entries:
        folders = [entry.path for entry in entries if entry.is_dir() and not is_stray(entry.name)]
    folder = only_folder(source) or (folders[0] if len(folders) == 1 else "")
    if not folder:
        return ""
    names = os.listdir(folder)
    known = (
        split_folders(folder)
        or ilsvrc.find_archives(folder)
        or any(_idx_file(folder, f"{prefix}-images", 3) for prefix in _IDX_PARTS)
        or any(name.endswith(".labels.npy") for name in names)
        or any(os.path.isdir(os.path.join(folder, f)) for f in ilsvrc.KAGGLE_FOLDERS)
        or holds_classes(folder)
        or (is_filler(os.path.basename(folder)) and not inner)
    )
    return folder if known else _wrapped(folder, inner=True)


# ---- IDX: MNIST, Fashion-MNIST, EMNIST --------------------------------------------------------------------------


def _idx_file(source: str, stem: str, dimensions: int) -> str:
    """Path of an IDX file under one of its usual names, or an empty string."""
    for middle in ("-", "."):
        for ending in (".gz", ""):
            path = os.path.join(source, f"{stem}{middle}idx{dimensions}-ubyte{ending}")
            if os.path.isfile(path):
                return path
    return ""


def _idx(source: str, prefixes: list[str], split: str) -> list[Items]:
    """train-images-idx3-ubyte[.gz] with its labels, and the same of t10k, which is the validation split."""
    found = []
    for prefix in prefixes:
        name = _IDX_PARTS[prefix] if not split or len(prefixes) > 1 else split
        images, labels = _idx_file(source, f"{prefix}-images", 3), _idx_file(source, f"{prefix}-labels", 1)
        if not labels:
            raise InputError(f"{prefix}-labels-idx1-ubyte.gz is missing in {source}")
        count, height, width = _idx_header(images, 3)
        values = _idx_labels(labels)
        if len(values) != count:
            raise InputError(f"{images} holds {count} images, {labels} {len(values)} labels")
        rows = Rows()
        for i, label in enumerate(values.tolist()):
            rows.add(f"{prefix} image {i}", label, 0, 16 + i * height * width, height * width)
        found.append((name, images, rows, (height, width), int(values.max(initial=0))))
    classes = _class_names(source, 1 + max(last for *_, last in found))
    return [
        rows.items(name, [images], classes, pixels=pixels, gzipped=images.endswith(".gz"))
        for name, images, rows, pixels, _ in found
    ]


def _idx_header(path: str, dimensions: int) -> tuple[int, ...]:
    """Sizes of an IDX file of bytes. Source: the description of the format on the MNIST page, yann.lecun.com."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            head = file.read(4 + 4 * dimensions)
        magic, *sizes = struct.unpack(f">{1 + dimensions}i", head)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise InputError(f"{path} is not an IDX file: {error}") from None
    if magic != 0x800 + dimensions or min(sizes) < 0:
        raise InputError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
    return tuple(sizes)


def _idx_labels(path: str) -> np.ndarray:
    (count,) = _idx_header(path, 1)
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            values = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if len(values) != count:
        raise InputError(f"{path} was cut off: {len(values)} of {count} labels")
    return values


def unpack_idx(items: Items, folder: str) -> str:
    """Unpack the gzipped images of an IDX source into `folder`, piece by piece; the path of the plain file."""
    path = os.path.join(folder, f"{items.split}.idx3-ubyte")
    height, width = items.pixels
    with gzip.open(items.files[0], "rb") as packed, open(path, "wb") as file:
        while True:
            try:
                piece = packed.read(1 << 20)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{items.files[0]} is damaged: {error}") from None
            if not piece:
                break
            file.write(piece)
        size = file.tell()
    if size < 16 + len(items.table) * height * width:
        raise InputError(f"{items.files[0]} was cut off: it unpacks to {size} bytes")
    return path


def _class_names(source: str, count: int) -> list[str]:
    """Lines of classes.txt beside the data, where it is there, else the numbers."""
    path = os.path.join(source, "classes.txt")
    if not os.path.isfile(path):
        return [str(label) for label in range(count)]
    with open(path, encoding="utf-8") as file:
        names = [line.strip() for line in file if line.strip()]
    if len(names) < count:
        raise InputError(f"{path} names {len(names)} classes, the data has labels up to {count - 1}")
    return names


# ---- WebDataset shards ------------------------------------------------------------------------------------------


def _webdataset(source: str, names: list[str]) -> list[Items]:
    """Shards that we or others packed, by their index. Image and label are taken over, other members are not."""
    splits = [name.removesuffix(".labels.npy") for name in names if name.endswith(".labels.npy")]
    found = []
    for name in splits:
        split = load_split(source, name)
        labels = iter(load_labels(split).tolist())
        paths = [split.path(shard.url) for shard in split.shards]
        if any(map(is_remote, paths)):
            raise InputError(f"{source}/{name}.json names shards of another machine; fetch them as files first")
        rows = Rows()
        for number, shard in enumerate(split.shards):
            for sample in read_idx(split, shard):
                image = image_member(sample, split.encoding)
                if image is None:
                    raise InputError(f"sample {sample[0].name} of {paths[number]} has no image")
                rows.add(
                    f"{os.path.basename(paths[number])}/{image.name}", next(labels), number, image.offset, image.size
                )
        pixels = (split.height, split.width, 3) if split.encoding == "raw" else None
        classes = split.classes or [str(i) for i in range(1 + max(rows.labels()))]
        mean = split.path(split.mean) if split.mean else ""
        found.append(rows.items(name, paths, list(classes), pixels=pixels, mean=mean if os.path.exists(mean) else ""))
    return found
