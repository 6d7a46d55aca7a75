"""Labels of images that are in no class folder, from a table of names and classes in any of the usual forms.

In: a text file and the names of the images. Out: the class of each image, and all classes, ordered by number.
"""

import csv
import dataclasses
import io
import os
import re
from collections.abc import Iterable, Iterator

from shards.errors import InputError, nearest
from shards.sources.spellings import composed

WNID = re.compile(r"n\d{8}")
_MAX_COLUMNS = 8  # of a table that are searched for names of images


@dataclasses.dataclass
class Labels:
    """Classes of some images."""

    path: str  # for messages
    values: list[str]  # class of each image: a name, or a number in the order of `classes`
    classes: list[str]  # all classes

    def numbers(self, images: list[str], classes: list[str]) -> list[int]:
        """Number of each image's class among `classes`.

        Raises:
            InputError: a class that is not among them.
        """
        number_of = NameTable(classes)
        found = []
        for image, value in zip(images, self.values, strict=True):
            number = number_of.find(value)
            if number is None and value.isdigit() and int(value) < len(classes):
                number = int(value)
            if number is None:
                hint = nearest(value, classes) if not value.isdigit() else "; numbers count from 0"
                raise InputError(
                    f"{self.path} gives {image} class {value}, which is not among the {len(classes)} classes{hint}"
                )
            found.append(number)
        return found


class NameTable:
    """Numbers by names, found in whatever Unicode form and, where that is not ambiguous, in whatever case."""

    def __init__(self, names: Iterable[str] = ()):
        self._exact: dict[str, int | None] = {}  # None: the name of several
        self._folded: dict[str, int | None] = {}
        for number, name in enumerate(names):
            self.add(name, number)

    def add(self, name: str, number: int) -> None:
        """Give a number another name."""
        name = composed(name)
        for table, key in ((self._exact, name), (self._folded, name.casefold())):
            table[key] = number if table.get(key, number) == number else None

    def find(self, name: str) -> int | None:
        """The number of this name, or None."""
        name = composed(name)
        return self._exact.get(name, self._folded.get(name.casefold()))


def read_table(path: str, images: list[str]) -> Labels:
    """Labels from a text file with one line per image: its name, with or without ending, and its class.

    Columns are separated by tabs, semicolons, commas, bars or blanks: by that which gives the most names of images.
    A class is a name, a WordNet id, or a number in sorted order. A first line that names no image is a header.

    Raises:
        InputError: the file cannot be read as such a table, or lacks an image.
    """
    rows, column = _best_reading(path, images)
    known = _Images(images)
    after = column + 1 if all(len(row) > column + 1 for row in rows) else column - 1
    values = [_class(row[after]) for row in rows]
    found = [known.find(row[column]) for row in rows]
    if found[0] is None and len(rows) > 1 and values[0] not in values[1:]:
        del rows[0], values[0], found[0]
    classes = _classes(path, values)
    label: list[str] = [""] * len(images)
    for row, value, number in zip(rows, values, found, strict=True):
        if number is not None:
            if label[number] not in ("", value):
                raise InputError(f"{path} gives {row[column]} two classes, {label[number]} and {value}")
            label[number] = value
    lacking = [image for image, value in zip(images, label, strict=True) if not value]
    if lacking:
        raise InputError(
            f"{path} has no label for {lacking[0]}, one of {len(lacking):,} of {len(images):,} images; add them, or "
            "remove the images"
        )
    if column:
        print(f"note: column {column + 1} of {path} names the images, column {after + 1} their classes")
    absent = [row[column] for row, number in zip(rows, found, strict=True) if number is None]
    if absent:
        print(f"note: {path} names {len(absent):,} images that are not there, such as {absent[0]}")
    return Labels(path, label, classes)


def _class(text: str) -> str:
    """A class as the table has it, without what follows a WordNet id (as in Kaggle's LOC_val_solution.csv)."""
    text = composed(" ".join(text.split()))
    first = text.partition(" ")[0]
    return first if WNID.fullmatch(first) else text


def _classes(path: str, values: list[str]) -> list[str]:
    """All classes of a table: 0 to the largest number, or the names sorted."""
    names = set(values) - {""}
    if all(re.fullmatch(r"-?\d+", name) for name in names):
        smallest = min(names, key=int, default="0")
        if int(smallest) < 0:
            raise InputError(f"{path} holds the class {smallest}; numbers count from 0")
        return [str(number) for number in range(max(map(int, names), default=0) + 1)]
    return sorted(names)


def _best_reading(path: str, images: list[str]) -> tuple[list[list[str]], int]:
    """Rows of a table, all with two columns or more, and the column that holds the names of images."""
    known, best = _Images(images), (0, 0, [])
    text = _read_text(path)
    try:
        for rows in _readings(text):
            width = min(map(len, rows), default=0)
            for column in range(min(width, _MAX_COLUMNS)):
                hits = sum(known.find(row[column]) is not None for row in rows)
                if hits > best[0]:
                    best = (hits, column, rows)
            if best[0] == len(rows) > 0:
                break
    except csv.Error as error:
        raise InputError(f"{path} is not a text file of two columns, image and class: {error}") from None
    if not best[0]:
        line = text.strip().partition("\n")[0][:60]
        raise InputError(
            f"{path} has no label for {images[0]} nor for any other image: each line must hold an image and its class, "
            + (f"the first is {line!r}" if line else "and it is empty")
        )
    return best[2], best[1]


def _readings(text: str) -> Iterator[list[list[str]]]:
    """The rows of a text by each separator that it may have. Only rows of two columns or more count."""
    for delimiter in "\t;,|":
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
        yield [row for row in ([cell.strip() for cell in row] for row in rows) if len(row) > 1]
    lines = [line.strip() for line in text.splitlines()]
    for pairs in ([line.split(None, 1) for line in lines], [line.rsplit(None, 1) for line in lines]):
        yield [[name, _first_number(value)] for name, value in (pair for pair in pairs if len(pair) == 2)]


def _first_number(text: str) -> str:
    """Of columns separated by blanks: a number is one column, and all words of a name are one."""
    first = text.split()[0]
    return first if first.isdigit() else text


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"cannot read the labels {path}: {error.strerror}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # Excel's "Unicode text"
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")  # as file names that are not UTF-8 are read


class _Images:
    """Finds images by what a table calls them: with folders or without, with their ending or without."""

    def __init__(self, images: list[str]):
        self._numbers = NameTable()
        for number, image in enumerate(images):
            for name in {image, _stem(image), os.path.basename(image), _stem(os.path.basename(image))}:
                self._numbers.add(name, number)

    def find(self, name: str) -> int | None:
        """Number of an image, or None."""
        name = name.strip().replace("\\", "/")
        while name:
            for key in (name, _stem(name)):
                if (number := self._numbers.find(key)) is not None:
                    return number
            name = name.partition("/")[2]
        return None


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot and ending.isalnum() and not ending.isdigit() else name
