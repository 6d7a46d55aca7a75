"""What can be packed: class folders, IDX files, ILSVRC archives, WebDataset shards.

In: a path. Out: one `Items` a split, in an order that depends on the names alone, so that a folder and an archive of
the same images are packed to the same bytes. Nothing is unpacked here, and of an archive only headers are read.
"""

import concurrent.futures
import gzip
import os
import struct
import zlib

import numpy as np

from shards import ilsvrc, tar
from shards.cli import InputError
from shards.items import Items, Rows
from shards.split import image_member, is_remote, load_labels, load_split, read_idx

# Files with other endings in a class folder are left out, and counted.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val"}
KAGGLE_FOLDER = "ILSVRC/Data/CLS-LOC"  # where Kaggle's copy of ImageNet keeps train and val
_IDX_PARTS = {"train": "train", "t10k": "val"}
_SCAN_THREADS = 16  # header reads wait for the disk or the network, not for the processor


def find(source: str, split: str = "", labels: str = "") -> list[Items]:
    """Everything in `source` that can be packed, the train split first.

    `split`: name for a source that holds one split, or the only one to be packed of a source that holds several.
    `labels`: labels of images that lie in no class folder (see ilsvrc.Labels).

    Raises:
        InputError: nothing to pack in it, unreadable, or labels missing.
    """
    if not os.path.exists(source):
        raise InputError(f"no such file or folder: {source}")
    try:
        if os.path.isdir(source):
            found = _find_in_folder(source.rstrip("/") or "/", split, labels)
        else:
            found = _ilsvrc([source], split, labels)
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
    folders = [name for name in SPLIT_FOLDERS if os.path.isdir(os.path.join(source, name))]
    archives = [os.path.join(source, name) for name in ilsvrc.ARCHIVES if name in names]
    if len(archives) == 1 and folders:
        raise InputError(
            f"{source} holds both {os.path.basename(archives[0])} and the folder {folders[0]}; pack them one by one "
            f"into the same DEST: {archives[0]}, then {source}/{folders[0]} with --split"
        )
    if archives:
        return _ilsvrc(archives, split, labels)
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
    kaggle = os.path.join(source, KAGGLE_FOLDER)
    if os.path.isdir(kaggle):
        return _folders(kaggle, split, labels or ilsvrc.find_labels(source), ilsvrc.synset_words(source))
    return _folders(source, split, labels, ilsvrc.synset_words(source))


# ---- class folders ----------------------------------------------------------------------------------------------


def _folders(source: str, split: str, labels: str, words: dict[str, str]) -> list[Items]:
    """SOURCE/train/CLASS/*, SOURCE/val/CLASS/* or SOURCE/CLASS/*; a split without class folders needs labels."""
    roots = {}
    for name, known in SPLIT_FOLDERS.items():
        if os.path.isdir(os.path.join(source, name)):
            if known in roots:
                raise InputError(f"{source} holds both {roots[known]} and {name}; pack one with --split and its path")
            roots[known] = name
    listed = {}
    for name, root in roots.items() or ((split or "train", ""),):
        if not split or name == split or not roots:
            listed[name] = (os.path.join(source, root).rstrip("/"), *_list_classes(os.path.join(source, root)))
    if not listed:
        raise InputError(f"{source} holds no split {split!r}, but {', '.join(roots)}")
    classes = _class_order(source, listed)
    words = words or (ilsvrc.Labels(labels).words if labels else {})
    found = []
    for name, (root, folders, flat, left_out) in listed.items():
        rows = Rows()
        if folders:
            for folder, files in folders.items():
                label = classes.index(folder)
                for file in files:
                    rows.add(f"{folder}/{file}", label)
            found.append((name, root, rows, left_out + len(flat)))
        else:
            if not labels:
                raise InputError(f"{root} holds images but no class folders; give their labels with --labels FILE")
            known = ilsvrc.Labels(labels)
            classes = classes or known.classes()
            numbers = {name: i for i, name in enumerate(classes)}
            for label, file in sorted((known.label(file, numbers), file) for file in flat):
                rows.add(file, label)
            found.append((name, root, rows, left_out))
    wnids = tuple(classes) if ilsvrc.are_wnids(classes) else ()
    named = [words.get(name, name) for name in classes]
    return [rows.items(name, [root], named, wnids=wnids, left_out=out) for name, root, rows, out in found]


def _list_classes(root: str) -> tuple[dict[str, list[str]], list[str], int]:
    """Images by class folder, images in no folder, and how many other files there are. All sorted."""
    folders: dict[str, list[str]] = {}
    flat: list[str] = []
    left_out = 0
    for entry in _scan_folder(root):
        if entry.is_dir():
            files, others = _list_images(entry.path)
            folders[entry.name] = files
            left_out += others
        elif entry.name.lower().endswith(IMAGE_ENDINGS):
            flat.append(entry.name)
        else:
            left_out += 1
    if not any(folders.values()):
        folders = {}
    if not folders and not flat:
        raise InputError(
            f"nothing to pack in {root}: neither class folders with images, nor IDX files, nor the ILSVRC2012 "
            "archives, nor shards with an index (python -m shards.index makes it)"
        )
    return folders, flat, left_out


def _list_images(folder: str) -> tuple[list[str], int]:
    """Paths of images below a folder, relative to it, sorted; and the number of other files."""
    files, left_out = [], 0
    for entry in _scan_folder(folder):
        if entry.is_dir(follow_symlinks=False):
            below, others = _list_images(entry.path)
            files += [f"{entry.name}/{name}" for name in below]
            left_out += others
        elif entry.name.lower().endswith(IMAGE_ENDINGS):
            files.append(entry.name)
        else:
            left_out += 1
    return sorted(files, key=os.fsencode), left_out


def _scan_folder(folder: str) -> list[os.DirEntry]:
    """Entries that are not hidden, sorted by the bytes of their names, in which WordNet ids are in order too."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))


def _class_order(source: str, listed: dict) -> list[str]:
    """Class folders sorted by name: those of the train split, which a validation split must not exceed."""
    classes = sorted(next(iter(listed.values()))[1], key=os.fsencode)
    for root, folders, *_ in listed.values():
        strange = sorted(set(folders) - set(classes)) if classes else []
        if strange:
            raise InputError(f"class {strange[0]} of {root} is not among the classes of {source}/{next(iter(listed))}")
    return classes


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


# ---- ILSVRC archives --------------------------------------------------------------------------------------------


def _ilsvrc(archives: list[str], split: str, labels: str) -> list[Items]:
    """The archives as ImageNet distributes them: train is a tar of class tars, val a tar of images."""
    folder = os.path.dirname(archives[0])
    if not labels:
        labels = ilsvrc.find_labels(folder)
    known = ilsvrc.Labels(labels) if labels else None
    words = ilsvrc.synset_words(folder) or (known.words if known else {})
    found = []
    train_classes: list[str] = []
    for archive in archives:
        if not archive.endswith(".tar"):
            raise InputError(f"{archive} is neither a folder nor a .tar archive")
        members = _tar_members(archive)
        rows = Rows()
        if members and members[0].name.endswith(".tar"):
            classes = train_classes = _class_tars(archive, members, rows)
            name = split if split and len(archives) == 1 else "train"
        else:
            if known is None:
                raise InputError(
                    f"{archive} holds images without classes: give their labels with --labels "
                    "ILSVRC2012_devkit_t12.tar.gz or a text file of two columns, name and class"
                )
            classes = train_classes or known.classes()
            images = [m for m in members if m.name.lower().endswith(IMAGE_ENDINGS)]
            numbers = {name: i for i, name in enumerate(classes)}
            for label, m in sorted(((known.label(m.name, numbers), m) for m in images), key=_by_label_and_name):
                rows.add(m.name, label, 0, m.offset, m.size)
            name = split if split and len(archives) == 1 else "val"
        wnids = tuple(classes) if ilsvrc.are_wnids(classes) else ()
        found.append(rows.items(name, [archive], [words.get(c, c) for c in classes], wnids=wnids))
    return found


def _by_label_and_name(row: tuple) -> tuple[int, str]:
    label, member = row
    return label, os.path.basename(member.name)


def _tar_members(path: str) -> list:
    """Members of one of the archives. It must end as tar ends it: a download may stop between two members."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            members = list(tar.members(tar.file_read(file), size))
        except tar.TarError as error:
            raise InputError(f"{path} is not a whole tar: {error}") from None
        last = members[-1] if members else None
        end = last.offset + (last.size + tar.BLOCK - 1) // tar.BLOCK * tar.BLOCK if last else 0
        if os.pread(file.fileno(), tar.BLOCK, end) != bytes(tar.BLOCK):
            raise InputError(f"{path} is not a whole tar: it ends after {len(members)} files without an end mark")
    return members


def _class_tars(archive: str, members: list, rows: Rows) -> list[str]:
    """Index the class tars inside an archive where they lie: a read of each header, none of the images."""
    tars = sorted((m for m in members if m.name.endswith(".tar")), key=lambda m: os.fsencode(m.name))
    classes = [os.path.basename(m.name).removesuffix(".tar") for m in tars]

    def scan(inner) -> list:
        with open(archive, "rb") as file:
            try:
                listed = list(tar.members(tar.file_read(file), inner.offset + inner.size, inner.offset))
            except tar.TarError as error:
                raise InputError(f"{inner.name} in {archive} is not a whole tar: {error}") from None
        listed = [m for m in listed if m.name.lower().endswith(IMAGE_ENDINGS)]
        return sorted(listed, key=lambda m: os.fsencode(m.name))

    with concurrent.futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
        for label, images in enumerate(pool.map(scan, tars)):
            for m in images:
                rows.add(f"{classes[label]}/{m.name}", label, 0, m.offset, m.size)
    return classes


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
