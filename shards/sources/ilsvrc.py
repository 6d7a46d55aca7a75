"""ImageNet (ILSVRC2012) as it is distributed: its archives, its devkit, its lists of labels and words.

In: ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz or Kaggle's files. Out: `Items`
of the archives, and the labels of validation images. Classes are numbered by sorted WordNet id, as in every
published model; the devkit's own numbers differ. Nothing is unpacked; of an archive only headers are read.
"""

import concurrent.futures
import functools
import gzip
import os
import re
import tarfile
import zlib

from shards.errors import InputError
from shards.format import tar
from shards.sources.items import Items, Rows
from shards.sources.labels import WNID, Labels, read_table
from shards.sources.mat import load_mat
from shards.sources.spellings import is_image, is_stray, split_of

# Where Kaggle's copy of ImageNet has train and val. LOC_val_solution.csv is beside the first folder of the path.
KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_LABEL_SOURCES = (
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_devkit_t12.tar",
    "ILSVRC2012_devkit_t12",
    "LOC_val_solution.csv",
    "val_annotations.txt",  # of Tiny ImageNet
    "val.txt",
)
_WORD_FILES = ("synset_words.txt", "LOC_synset_mapping.txt", "words.txt")
_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_IMAGE_NUMBER = re.compile(r"_(\d{8})(?:_n\d{8})?\.[^.]+$")
_WNID_IN_NAME = re.compile(r"(?:^|/)(n\d{8})_[^/]*$|_(n\d{8})\.[^./]+$")
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")  # compressed: images cannot be read in place
_SCAN_THREADS = 16  # reading headers waits for the disk or the network, not for the processor
_PEEKED = 8  # members of a tar that tell whether it is an archive or a shard


def are_wnids(classes: list[str]) -> bool:
    """Whether these class names are WordNet ids."""
    return bool(classes) and all(WNID.fullmatch(name) for name in classes)


# ---- labels and words -------------------------------------------------------------------------------------------


def label_folders(folder: str) -> list[str]:
    """Where labels and words may be: in the folder, and above that in which Kaggle's copy has the images."""
    found = [folder]
    path = os.path.abspath(folder)
    for tail in KAGGLE_FOLDERS:
        if path.endswith(f"/{tail}"):
            found.append(path.removesuffix(f"/{tail}"))
    return found


def find_labels(folders: list[str]) -> str:
    """The devkit or a label file in one of the folders, or an empty string."""
    for folder in folders:
        names = {name.lower(): name for name in sorted(os.listdir(folder))}
        for name in _LABEL_SOURCES:
            if name.lower() in names:
                return os.path.join(folder, names[name.lower()])
    return ""


def synset_words(folders: list[str], labels: str) -> dict[str, str]:
    """Names of classes by WordNet id, from a file of words in `folders`, or from the devkit, if `labels` is that."""
    for path in (os.path.join(folder, name) for folder in folders for name in _WORD_FILES):
        if os.path.isfile(path):
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                pairs = [line.split(None, 1) for line in file if line.strip()]
            return {pair[0]: pair[-1].strip() for pair in pairs if WNID.fullmatch(pair[0])}
    return {wnid: words for wnid, words in _synsets(labels).values()} if _is_devkit(labels) else {}


def _is_devkit(path: str) -> bool:
    return os.path.isdir(path) or (os.path.exists(path) and path.endswith((".tar.gz", ".tgz", ".tar")))


def read_labels(path: str, images: list[str]) -> Labels:
    """Labels of images from the devkit (archive or folder) or from a table (labels.read_table).

    Raises:
        InputError: neither, or an image without a label.
    """
    if not os.path.exists(path):
        raise InputError(f"no label file {path}")
    return _read_devkit(path, images) if _is_devkit(path) else read_table(path, images)


def labels_in_names(images: list[str]) -> Labels | None:
    """Labels from the WordNet ids in names such as n01440764_36.JPEG; None: not all names have one."""
    found = [_WNID_IN_NAME.search(image) for image in images]
    if not images or not all(found):
        return None
    values = [match[1] or match[2] for match in found]
    print(f"note: the names of {len(images):,} images contain their classes, such as {images[0]}")
    return Labels("their names", values, sorted(set(values)))


def _read_devkit(path: str, images: list[str]) -> Labels:
    synsets = _synsets(path)
    try:
        of_number = [synsets[int(line)][0] for line in _devkit_file(path, _TRUTH).split()]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path} is not the ILSVRC2012 devkit: {type(error).__name__} {error} in {_TRUTH}") from None
    values = []
    for image in images:
        number = _IMAGE_NUMBER.search(image)
        if not number or not 1 <= int(number[1]) <= len(of_number):
            raise InputError(f"{image} is not one of the {len(of_number)} validation images of {path}")
        values.append(of_number[int(number[1]) - 1])
    return Labels(path, values, sorted(wnid for wnid, _ in synsets.values()))


@functools.cache
def _synsets(path: str) -> dict[int, tuple[str, str]]:
    """WordNet id and words of the devkit's classes, by its own numbers."""
    synsets = load_mat(_devkit_file(path, _META), f"{path}:{_META}").get("synsets")
    try:
        # Inner nodes of the tree (num_children > 0) have no images.
        leaves = [s for s in synsets if int(s["num_children"].item()) == 0]
        return {int(s["ILSVRC2012_ID"].item()): (s["WNID"], s["words"]) for s in leaves}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the ILSVRC2012 devkit: {type(error).__name__} {error} in {_META}") from None


def _devkit_file(path: str, name: str) -> bytes:
    """The bytes of a file of the devkit, which is a folder or an archive."""
    try:
        if os.path.isdir(path):
            with open(os.path.join(path, name), "rb") as file:
                return file.read()
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and member.name.endswith(name):
                    return archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is not a whole archive: {error}") from None
    except FileNotFoundError:
        pass
    raise InputError(f"{path} holds no {name}; give ILSVRC2012_devkit_t12.tar.gz or its folder")


# ---- archives ---------------------------------------------------------------------------------------------------


def find_archives(folder: str) -> dict[str, str]:
    """Paths of the archives of train and val in a folder, by split; their names may be spelled differently.

    Raises:
        InputError: two for one split, or one that is compressed.
    """
    found: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        stem, dot, endings = name.partition(".tar")
        split, path = split_of(stem), os.path.join(folder, name)
        # A number at the end means one of many, as shards are.
        if not dot or is_stray(name) or split not in ("train", "val") or stem[-1:].isdigit():
            continue
        if endings in _PACKED:
            raise InputError(f"{path} is compressed, so that no image can be read in place; unpack it to a .tar")
        if endings or not ("ilsvrc" in stem.lower() or _is_archive(path)):
            continue
        if split in found:
            raise InputError(f"{folder} holds both {os.path.basename(found[split])} and {name}; move one away")
        found[split] = path
    return {split: found[split] for split in ("train", "val") if split in found}


def _is_archive(path: str) -> bool:
    """Whether a tar begins with images only, or with class tars only: shards also hold labels."""
    names = []
    with open(path, "rb") as file:
        try:
            for member in tar.members(tar.file_read(file), os.path.getsize(path)):
                names += [] if is_stray(member.name) else [member.name]
                if len(names) == _PEEKED:
                    break
        except tar.TarError:
            return False
    return bool(names) and (all(map(is_image, names)) or all(name.endswith(".tar") for name in names))


def compressed(folder: str) -> str:
    """An archive in a folder that must be unpacked before anything in it can be packed, or an empty string."""
    return next((name for name in sorted(os.listdir(folder)) if name.endswith(_PACKED) and not is_stray(name)), "")


def read_archives(archives: dict[str, str], labels: str) -> list[Items]:
    """The splits in archives as ImageNet distributes them: train is a tar of class tars, val a tar of images."""
    folder = os.path.dirname(next(iter(archives.values()))) or "."
    labels = labels or find_labels([folder])
    words = synset_words([folder], labels)
    found = []
    train_classes: list[str] = []
    for split, archive in archives.items():
        if not archive.endswith(".tar"):
            raise InputError(f"{archive} is neither a folder nor a .tar archive")
        members = [m for m in _tar_members(archive) if not is_stray(m.name)]
        rows = Rows()
        if members and members[0].name.endswith(".tar"):
            classes = train_classes = _class_tars(archive, members, rows)
        else:
            images = [m for m in members if is_image(m.name)]
            known = _labels_of(archive, [m.name for m in images], labels)
            classes = train_classes or known.classes
            numbers = known.numbers([m.name for m in images], classes)
            for label, m in sorted(zip(numbers, images, strict=True), key=_by_label_and_name):
                rows.add(m.name, label, 0, m.offset, m.size)
        found.append((split or ("train" if classes is train_classes else "val"), archive, classes, rows))
    return [
        rows.items(
            split,
            [archive],
            [words.get(c, c) for c in classes],
            wnids=tuple(classes) if are_wnids(classes) else (),
        )
        for split, archive, classes, rows in found
    ]


def _labels_of(archive: str, names: list[str], labels: str) -> Labels:
    if not names:
        raise InputError(f"{archive} holds neither images nor class tars")
    known = read_labels(labels, names) if labels else labels_in_names(names)
    if known is None and all("/" in name.removeprefix("./") for name in names):
        raise InputError(f"{archive} holds folders of images: unpack it (tar xf), and pack the resulting folder")
    if known is None:
        raise InputError(
            f"{archive} holds images without classes: give their labels with --labels ILSVRC2012_devkit_t12.tar.gz "
            "or a text file of two columns, name and class"
        )
    return known


def _by_label_and_name(row: tuple) -> tuple[int, str]:
    label, member = row
    return label, os.path.basename(member.name)


def _tar_members(path: str) -> list:
    """Members of one of the archives."""
    with open(path, "rb") as file:
        try:
            return list(tar.members(tar.file_read(file), os.path.getsize(path)))
        except tar.TarError as error:
            raise InputError(f"{path} is not a whole tar: {error}") from None


def _class_tars(archive: str, members: list, rows: Rows) -> list[str]:
    """Add the images of the class tars in an archive; the classes. Of each image only the header is read."""
    tars = sorted((m for m in members if m.name.endswith(".tar")), key=lambda m: os.fsencode(os.path.basename(m.name)))
    classes = [os.path.basename(m.name).removesuffix(".tar") for m in tars]

    def scan(inner) -> list:
        with open(archive, "rb") as file:
            try:
                listed = list(tar.members(tar.file_read(file), inner.offset + inner.size, inner.offset))
            except tar.TarError as error:
                raise InputError(f"{inner.name} in {archive} is not a whole tar: {error}") from None
        listed = [m for m in listed if is_image(m.name)]
        if not listed:
            raise InputError(f"the class {inner.name} in {archive} holds no images; remove it, or download it again")
        return sorted(listed, key=lambda m: os.fsencode(m.name))

    with concurrent.futures.ThreadPoolExecutor(_SCAN_THREADS) as pool:
        for label, images in enumerate(pool.map(scan, tars)):
            for m in images:
                rows.add(f"{classes[label]}/{m.name}", label, 0, m.offset, m.size)
    return classes
