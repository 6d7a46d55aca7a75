"""Labels and class names of ImageNet (ILSVRC2012): the devkit, two-column files, synset lists.

In: ILSVRC2012_devkit_t12.tar.gz or its folder, or a text file of names and classes. Out: the class of each validation
image. Classes are numbered by sorted WordNet id, as in every published model; the devkit's own numbers differ.
"""

import gzip
import os
import re
import tarfile
import zlib

from shards.cli import InputError
from shards.mat import load_mat

ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
_LABEL_SOURCES = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12", "LOC_val_solution.csv", "val.txt")
_WORD_FILES = ("synset_words.txt", "LOC_synset_mapping.txt")
_META = "data/meta.mat"
_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_WNID = re.compile(r"n\d{8}")
_IMAGE_NUMBER = re.compile(r"_(\d{8})\.[^.]+$")


def are_wnids(classes: list[str]) -> bool:
    """Whether these class names are WordNet ids."""
    return bool(classes) and all(_WNID.fullmatch(name) for name in classes)


def find_labels(folder: str) -> str:
    """The devkit or a label file beside the archives, or an empty string."""
    return next((p for n in _LABEL_SOURCES if os.path.exists(p := os.path.join(folder, n))), "")


def synset_words(folder: str) -> dict[str, str]:
    """Words by WordNet id from synset_words.txt or LOC_synset_mapping.txt in `folder`, where there is one."""
    for name in _WORD_FILES:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                pairs = [line.strip().split(" ", 1) for line in file if line.strip()]
            return {pair[0]: pair[-1] for pair in pairs}
    return {}


class Labels:
    """Classes of images that lie in no class folder.

    `path` is the devkit (archive or folder), or a text file with a line an image: its name, with or without ending,
    and its class, a WordNet id or a number in sorted order, separated by blanks or a comma; more columns are ignored.
    """

    def __init__(self, path: str):
        self.path = path
        self.words: dict[str, str] = {}
        self._classes: list[str] = []
        self._by_name: dict[str, str] = {}
        self._truth: list[str] = []  # WordNet id of validation image 1, 2, ...
        if not os.path.exists(path):
            raise InputError(f"no label file {path}")
        if os.path.isdir(path) or path.endswith((".tar.gz", ".tgz", ".tar")):
            self._read_devkit()
        else:
            self._read_columns()

    def _read_devkit(self) -> None:
        meta, truth = _devkit_file(self.path, _META), _devkit_file(self.path, _TRUTH)
        synsets = load_mat(meta, f"{self.path}:{_META}").get("synsets")
        try:
            # Inner nodes of the tree (num_children > 0) are classes of no image.
            leaves = [s for s in synsets if int(s["num_children"].item()) == 0]
            wnid_of = {int(s["ILSVRC2012_ID"].item()): s["WNID"] for s in leaves}
            self.words = {s["WNID"]: s["words"] for s in leaves}
            self._truth = [wnid_of[int(line)] for line in truth.split()]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"{self.path} is not the ILSVRC2012 devkit: {type(error).__name__} {error} in {_META} or {_TRUTH}"
            ) from None
        self._classes = sorted(wnid_of.values())

    def _read_columns(self) -> None:
        with open(self.path, encoding="utf-8", errors="replace") as file:
            lines = [re.split(r"[,\s]+", line.strip()) for line in file if line.strip()]
        if lines and not (lines[0][-1].isdigit() or _WNID.fullmatch(lines[0][min(1, len(lines[0]) - 1)])):
            lines = lines[1:]  # a header line, as Kaggle's LOC_val_solution.csv has
        for number, words in enumerate(lines, 1):
            if len(words) < 2:
                raise InputError(f"line {number} of {self.path} is not an image name and a class: {' '.join(words)!r}")
            self._by_name[_stem(words[0])] = words[1]
        values = set(self._by_name.values())
        if not values:
            raise InputError(f"{self.path} holds no labels")
        if all(value.isdigit() for value in values):
            self._classes = [str(i) for i in range(max(map(int, values)) + 1)]
        else:
            self._classes = sorted(values)

    def classes(self) -> list[str]:
        """All classes, in the order of their numbers: of the devkit, else those that occur in the file."""
        return self._classes

    def label(self, name: str, numbers: dict[str, int]) -> int:
        """Number of an image's class. `numbers`: number of each class.

        Raises:
            InputError: the image has no label here, or one that is not among `numbers`.
        """
        if self._truth:
            number = _IMAGE_NUMBER.search(name)
            if not number or not 1 <= int(number[1]) <= len(self._truth):
                raise InputError(f"{name} is not one of the {len(self._truth)} validation images of {self.path}")
            value = self._truth[int(number[1]) - 1]
        else:
            value = self._by_name.get(_stem(name), "")
            if not value:
                raise InputError(f"{self.path} has no label for {name}")
        label = numbers.get(value, int(value) if value.isdigit() else len(numbers))
        if label >= len(numbers):
            raise InputError(f"{self.path} gives {name} class {value}, which is not among the {len(numbers)} classes")
        return label


def _stem(name: str) -> str:
    base = os.path.basename(name)
    stem, dot, ending = base.rpartition(".")
    return stem if dot and ending.isalnum() and not ending.isdigit() else base


def _devkit_file(path: str, name: str) -> bytes:
    """A file of the devkit, which is a folder or an archive. Nothing is unpacked to disk."""
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
