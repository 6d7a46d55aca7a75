"""Finds what can be packed: class folders, IDX files, ILSVRC archives, WebDataset shards.

In: a path. Out: one `Items` per split. The order of its images depends on their names only, so that a folder and an
archive of the same images are packed to the same bytes. Nothing is unpacked; of an archive only headers are read.
"""

import os

from shards.errors import InputError
from shards.format.split import BARE, image_member, load_labels, load_split, read_idx
from shards.machine.files import is_remote
from shards.sources import ilsvrc
from shards.sources.folders import find_in_folders, holds_classes, only_folder, split_folders
from shards.sources.items import Items, Rows
from shards.sources.mnist import holds_idx, read_idx_files
from shards.sources.spellings import is_filler, is_stray


def find(source: str, split: str = "", labels: str = "") -> list[Items]:
    """Everything in `source` that can be packed, the train split first.

    Args:
        split: name of the split, if the source holds one; if it holds several, the only one to find.
        labels: file with the labels of images that are in no class folder (see shards.sources.labels).

    Raises:
        InputError: there is nothing to pack, it cannot be read, or labels are missing.
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
            f"{folders[min(unpacked)][0]}; pack them by two commands into the same DEST, the folder with --split"
        )
    if archives and unpacked:
        beside = ("folders", "archives") if set(archives) < unpacked else ("archives", "folders")
        print(f"note: the {beside[0]} in {source} are packed, the {beside[1]} beside them are not")
    if archives and not set(archives) < unpacked:
        if split and len(archives) == 1:
            archives = {split: next(iter(archives.values()))}
        return ilsvrc.read_archives(archives, labels)
    idx = holds_idx(source)
    shards = any(name.endswith(".labels.npy") for name in names)
    if labels and (idx or shards):
        raise InputError(f"--labels is for images without class folders; {source} holds labels of its own")
    if idx:
        return read_idx_files(source, split)
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
    """The folder to pack in one that holds only that folder (SOURCE/dataset/train/...), or an empty string."""
    with os.scandir(source) as entries:
        folders = [entry.path for entry in entries if entry.is_dir() and not is_stray(entry.name)]
    folder = only_folder(source) or (folders[0] if len(folders) == 1 else "")
    if not folder:
        return ""
    names = os.listdir(folder)
    known = (
        split_folders(folder)
        or ilsvrc.find_archives(folder)
        or holds_idx(folder)
        or any(name.endswith(".labels.npy") for name in names)
        or any(os.path.isdir(os.path.join(folder, f)) for f in ilsvrc.KAGGLE_FOLDERS)
        or holds_classes(folder)
        or (is_filler(os.path.basename(folder)) and not inner)
    )
    return folder if known else _wrapped(folder, inner=True)


def _webdataset(source: str, names: list[str]) -> list[Items]:
    """Shards, packed here or elsewhere, by their index. Image and label are packed again, other members are not."""
    splits = [name.removesuffix(".labels.npy") for name in names if name.endswith(".labels.npy")]
    found = []
    for name in splits:
        split = load_split(source, name)
        labels = iter(load_labels(split).tolist())
        paths = [split.path(shard.url) for shard in split.shards]
        if any(map(is_remote, paths)):
            raise InputError(f"{source}/{name}.json names shards on another machine; download them first")
        rows = Rows()
        for number, shard in enumerate(split.shards):
            for sample in read_idx(split, shard):
                image = image_member(sample, split.encoding)
                if image is None:
                    raise InputError(f"sample {sample[0].name} of {paths[number]} has no image")
                rows.add(
                    f"{os.path.basename(paths[number])}/{image.name}", next(labels), number, image.offset, image.size
                )
        bare = split.encoding in BARE
        about = {"pixels": (split.height, split.width, 3), "planes": split.encoding == "planes"} if bare else {}
        classes = split.classes or [str(i) for i in range(1 + max(rows.labels()))]
        mean = split.path(split.mean) if split.mean else ""
        found.append(rows.items(name, paths, list(classes), mean=mean if os.path.exists(mean) else "", **about))
    return found
