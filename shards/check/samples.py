"""What makes a sample usable: one image member and one label member that can be read.

In: the members of a sample and a rule for its label. Out: the image, the label, or a `BadSample` that says what is
wrong; `Problem` names the place of what is wrong for a report.
"""

import collections
import dataclasses
import json
from collections.abc import Iterable

from shards.errors import few, printable, short
from shards.format.split import BARE, Member, image_member
from shards.format.tar import split_name

MAX_LABEL_BYTES = 1 << 20  # a label member above this size is not read
MAX_CLASSES = 1 << 20  # larger labels are damage: class_counts would fill the memory


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """Where the label of a sample is."""

    member: str  # extension of the member, lower case
    key: str = ""  # field in it, if it is JSON
    names: tuple[str, ...] = ()  # classes that a label may name instead of giving its number
    classes: int = MAX_CLASSES  # labels are below this


class BadSample(Exception):
    """A sample that cannot be used for training. The message says why; `kind` is that of the `Problem`."""

    def __init__(self, message: str, kind: str = "label"):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a split, one of its shards or one of its samples."""

    kind: str  # tar, image, label, index, checksum, shard, key or count
    message: str
    shard: str = ""  # URL as in the index
    sample: int = -1  # number in the tar; -1: the problem is not that of one sample
    key: str = ""  # of the sample

    def __str__(self) -> str:
        place = self.shard + (f": sample {self.sample} (key {short(self.key)!r})" if self.sample >= 0 else "")
        return printable(f"{short(place, 150)}: {self.message}" if place else self.message)


def read_label(data: bytes, rule: LabelRule) -> int:
    """The label in the bytes of a label member. Raises BadSample if there is none."""
    value: object = data.decode("utf-8", "replace").strip()
    if rule.key:
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadSample(f".{rule.member} is not JSON: {error}") from None
        if not isinstance(fields, dict) or rule.key not in fields:
            has = few(fields, separator=", ") if isinstance(fields, dict) else type(fields).__name__
            raise BadSample(f".{rule.member} has no field {rule.key!r} (it has {has})")
        value = fields[rule.key]
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None
    if text is not None and text.isascii() and text.isdigit() and len(text) < 12:
        label = int(text)
    elif text is not None and text in rule.names:
        label = rule.names.index(text)
    else:
        raise BadSample(f"label {str(value)[:40]!r} is neither a number from 0 nor the name of a class")
    if label >= rule.classes:
        raise BadSample(f"label {label} is outside the {rule.classes} classes")
    return label


def check_members(sample: tuple[Member, ...], rule: LabelRule, encoding: str) -> tuple[Member, Member]:
    """Image and label member of a sample. Raises BadSample if one is missing, or if two have the same extension."""
    extensions = collections.Counter(member.ext.lower() for member in sample)
    if len(extensions) < len(sample):
        twice = next(ext for ext, times in extensions.items() if times > 1)
        raise BadSample(f"it has two members .{short(twice)}{dots_hint(sample)}")
    image = image_member(sample, encoding)
    label = next((member for member in sample if member.ext.lower() == rule.member), None)
    has = "" if image and label else f"it has {few(('.' + ext for ext in extensions), 4)}{dots_hint(sample)}"
    if image is None:
        raise BadSample(f"it has no image member .jpg .jpeg .png .webp, .raw or .yuv ({has})")
    if label is None:
        raise BadSample(f"it has no label member .{rule.member} ({has})")
    if not image.size:
        raise BadSample(f"its image .{short(image.ext)} is empty (0 bytes)")
    if label.size > MAX_LABEL_BYTES:
        raise BadSample(f".{rule.member} has {label.size} bytes, too many for a label")
    return image, label


def dots_hint(members: Iterable[Member]) -> str:
    """Advice to rename members if the stems of their names seem to have dots, as in `img.001.jpg`; else empty."""
    example = ""
    for member in members:
        if "." not in member.ext:
            return ""
        example = example or member.name.rpartition("/")[2]
    if not example:
        return ""
    stem, dot, ending = example.rpartition(".")
    renamed = short(stem.replace(".", "_") + dot + ending)
    return f"; in WebDataset a key ends at the first dot of a name: call {short(example)} {renamed}"


def sample_key(sample: tuple[Member, ...]) -> str:
    """Key of a sample: the name of its first member without the extension."""
    return split_name(sample[0].name)[0]


def encoding_of(sample: tuple[Member, ...]) -> str:
    """ "raw", "planes" or "jpeg" (any image file), as in <split>.json, by the members of one sample."""
    if image_member(sample, "jpeg") is not None:
        return "jpeg"
    return next((encoding for encoding in BARE if image_member(sample, encoding)), "jpeg")
