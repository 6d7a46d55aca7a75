"""A split of a data set on disk: `<split>.json` (wids layout, extended), its labels, and an `.idx` beside each tar.

In: a folder or URL of shards. Out: `Split` (what there is), `load_labels` (the label of each sample) and `read_idx`
(where each sample's bytes lie in a tar).
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import re
from typing import TYPE_CHECKING

from shards.errors import InputError, few, nearest
from shards.machine.files import REMOTE_SCHEMES, is_remote, read_file, write_whole

if TYPE_CHECKING:  # numpy is imported where it is used: --help of the commands that read a split must not wait for it
    import numpy as np

INDEX_VERSION = "v1.2"  # first word of an .idx file as NVIDIA DALI's wds2idx writes it
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of image members that are files, in lower case
# Encodings whose images are bare pixels, all of one size, and the extension of their members.
BARE = {"raw": "raw", "planes": "yuv"}

# Fields of <split>.json and of its shards.
_FILE_FIELDS = ("labels", "labels_sha256", "crc32", "crc32_sha256")
_FIELDS = {"__kind__", "wids_version", "name", "shardlist", "classes", "mean", "image", "label", *_FILE_FIELDS}
_SHARD_FIELDS = {
    "url": str,
    "nsamples": int,
    "filesize": int,
    "sha256": str,
    "bad": lambda numbers: tuple(map(int, numbers)),
    "idx": str,
    "repaired": bool,
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a sample inside a tar: `data[offset : offset + size]` are its bytes."""

    ext: str  # what follows the first dot of the base name: "jpg", "cls"
    offset: int  # bytes from the start of the tar to the member's data
    size: int  # bytes
    name: str  # full member name


@dataclasses.dataclass(frozen=True)
class Shard:
    """One tar of a split."""

    url: str  # relative to the split's root, or absolute
    nsamples: int
    filesize: int = 0  # bytes; 0: not recorded
    sha256: str = ""  # hex digest of the whole tar; empty: not recorded
    bad: tuple[int, ...] = ()  # samples that were left out of the index, numbered as in the tar
    idx: str = ""  # its .idx, relative to the split's root, or absolute; empty: beside the tar
    repaired: bool = False  # the tar is known to be damaged; the .idx lists its sound samples only


@dataclasses.dataclass(frozen=True)
class Split:
    """The samples of one split ("train", "val"), in shard order."""

    name: str
    root: str  # folder or URL in which <split>.json lies
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] = ()  # class names; a label is an index into them
    mean: str = ""  # file of the mean image (float32 .npy, H x W x 3), relative to root; empty: none
    # "raw": each image member is uint8 (height, width, 3); "planes": see shards.read.planes; "jpeg": an image file of
    # any kind.
    encoding: str = "jpeg"
    height: int = 0  # pixels, if all images of the split have one size; else 0
    width: int = 0
    label_member: str = "cls"  # member that holds the label: "cls" is decimal text
    label_key: str = ""  # field of the label in a "json" member
    labels: str = ""  # file of all labels (int32 .npy, one number per sample in shard order), relative to root
    labels_sha256: str = ""  # hex digest of that file: damage cannot give a wrong label
    crc32: str = ""  # file of CRC-32s (uint32 .npy), one per sample over its members' data in .idx order; empty: none
    crc32_sha256: str = ""
    extra: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)  # further fields of the JSON

    @property
    def nsamples(self) -> int:
        """Samples of all shards."""
        return sum(shard.nsamples for shard in self.shards)

    def path(self, name: str) -> str:
        """Full path or URL of a file named relative to the split's root.

        Raises:
            InputError: a URL of another kind (`pipe:` would run a command), or a path of this machine in an index
                that lies on another.
        """
        scheme = _SCHEME.match(name)
        if scheme:
            if scheme[1].lower() not in REMOTE_SCHEMES or not name[scheme.end() :].startswith("//"):
                raise InputError(
                    f"{self.root}/{self.name}.json names {name[:80]!r}: only files and {', '.join(REMOTE_SCHEMES)} "
                    "URLs are read; fetch such shards as files first"
                )
            return name
        if os.path.isabs(name):
            if is_remote(self.root):
                raise InputError(f"{self.root}/{self.name}.json names {name[:80]!r}, which is not on its server")
            return name
        return f"{self.root.rstrip('/')}/{name}"

    def idx_path(self, shard: Shard) -> str:
        """Full path or URL of a shard's .idx."""
        return self.path(shard.idx or idx_path(shard.url))


def image_member(sample: tuple[Member, ...], encoding: str) -> Member | None:
    """The image of a sample: its first member with the extension of an image; None: it has none.

    A longer extension (`.img.png`) counts only if there is no other: beside a `.jpg`, `.seg.png` is a mask.
    """
    endings = (BARE[encoding],) if encoding in BARE else IMAGE_EXTENSIONS
    whole = next((member for member in sample if member.ext.lower() in endings), None)
    return whole or next((m for m in sample if m.ext.rpartition(".")[2].lower() in endings), None)


def load_split(data: str, name: str) -> Split:
    """The split `name` of the shard folder `data`, a local folder or an http(s):// or s3:// URL.

    Raises:
        InputError: no such folder, no such split, or the index is damaged.
    """
    return parse_split(load_fields(data, name), name, data, f"{data.rstrip('/')}/{name}.json")


def load_fields(data: str, name: str) -> dict:
    """The fields of `<split>.json` as they are in the file. Raises InputError as load_split does."""
    path = f"{data.rstrip('/')}/{name}.json"
    if not is_remote(data) and not os.path.isdir(data):
        raise InputError(f"no data folder {data}; give the folder that shards.pack wrote with --data")
    try:
        fields = json.loads(read_file(path))
    except FileNotFoundError:
        if is_remote(data):
            raise InputError(f"there is no {path}; the address should be of a folder that shards.pack wrote") from None
        found = sorted(entry for entry in os.listdir(data) if entry.endswith(".tar"))
        if any(entry.startswith(f"{name}-") for entry in found):
            raise InputError(f"{path} is missing; make it with python -m shards.index {data}") from None
        splits = sorted({entry.rsplit("-", 1)[0] for entry in found})
        hint = f"{nearest(name, splits)} it holds {few(splits, separator=', ')}" if splits else "it holds no tar shards"
        raise InputError(f"no shards of split {name!r} in {data}: {hint}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the shard index {path}: {error}; python -m shards.index makes it anew") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path} is not a shard index; python -m shards.index makes it anew")
    return fields


def parse_split(fields: dict, name: str, root: str, path: str) -> Split:
    """`Split` from the parsed JSON of `path`. Raises InputError when a field is missing or of the wrong kind."""
    try:
        if fields["wids_version"] != 1:
            raise ValueError(f"wids_version {fields['wids_version']}, not 1")
        image, label = fields.get("image", {}), fields.get("label", {})
        split = Split(
            name=name,
            root=root,
            shards=tuple(
                Shard(**{key: kind(entry[key]) for key, kind in _SHARD_FIELDS.items() if key in entry})
                for entry in fields["shardlist"]
            ),
            classes=tuple(map(str, fields.get("classes", ()))),
            mean=str(fields.get("mean", "")),
            encoding=str(image.get("encoding", "jpeg")),
            height=int(image.get("height", 0)),
            width=int(image.get("width", 0)),
            label_member=str(label.get("member", "cls")),
            label_key=str(label.get("key", "")),
            **{key: str(fields.get(key, "")) for key in _FILE_FIELDS},
            extra={key: value for key, value in fields.items() if key not in _FIELDS},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is not a shard index: {type(error).__name__} {error}; python -m shards.index makes it anew"
        ) from None
    if split.nsamples < 1 or any(shard.nsamples < 0 for shard in split.shards):
        raise InputError(f"{path} lists no samples; pack the split again")
    for shard in split.shards:
        split.path(shard.url)
        split.idx_path(shard)
    return split


def save_split(split: Split, path: str, **extra) -> None:
    """Write `<split>.json` at `path`, whole or not at all. `extra`: further fields, besides `split.extra`."""
    fields = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split.name,
        "shardlist": [_shard_fields(shard) for shard in split.shards],
        "classes": list(split.classes),
        "mean": split.mean,
        "image": {"encoding": split.encoding, "height": split.height, "width": split.width},
        "label": {"member": split.label_member, "key": split.label_key},
        **{key: getattr(split, key) for key in _FILE_FIELDS},
    }
    write_whole(path, (json.dumps({**fields, **split.extra, **extra}, indent=1) + "\n").encode())


def save_index(split: Split, out: str, labels: "np.ndarray", crc32: "np.ndarray | None") -> Split:
    """Write `<split>.labels.npy`, `<split>.crc32.npy` and, last, `<split>.json` into `out`; the split as written.

    Args:
        labels: int32 (nsamples,), in shard order.
        crc32: uint32 (nsamples,); None: not known, and the index then has none.
    """
    import numpy as np

    name = f"{split.name}.labels.npy"
    split = dataclasses.replace(split, labels=name, labels_sha256=save_column(out, name, labels), crc32="")
    if crc32 is not None:
        name = f"{split.name}.crc32.npy"
        split = dataclasses.replace(split, crc32=name, crc32_sha256=save_column(out, name, crc32))
    counts = np.bincount(labels, minlength=len(split.classes)).tolist()
    split = dataclasses.replace(split, extra={"class_counts": []} | split.extra | {"class_counts": counts})
    save_split(split, os.path.join(out, f"{split.name}.json"))
    return split


def _shard_fields(shard: Shard) -> dict:
    fields = dataclasses.asdict(shard)
    return {key: value for key, value in fields.items() if key in ("url", "nsamples") or value}


def load_labels(split: Split) -> "np.ndarray":
    """Label of each sample, int32 of shape (nsamples,), in shard order, checked against the digest in the index.

    Training takes labels only from here, so that a damaged shard cannot give a wrong one.

    Raises:
        InputError: no such file, its digest differs, or a label is outside the classes.
    """
    labels = _load_column(split, split.labels, split.labels_sha256, "int32", "labels")
    if labels.min() < 0 or (split.classes and labels.max() >= len(split.classes)):
        sample = int(((labels < 0) | (labels >= (len(split.classes) or 1 << 31))).argmax())
        raise InputError(
            f"{split.path(split.labels)}: sample {sample} has label {labels[sample]}, but there are "
            f"{len(split.classes) or 'only non-negative'} classes; python -m shards.index {split.root} makes it anew"
        )
    return labels


def load_crc32(split: Split) -> "np.ndarray | None":
    """CRC-32 of each sample, uint32 of shape (nsamples,), in shard order; None: they were not recorded."""
    if not split.crc32:
        return None
    return _load_column(split, split.crc32, split.crc32_sha256, "uint32", "checksums")


def _load_column(split: Split, name: str, sha256: str, dtype: str, what: str) -> "np.ndarray":
    advice = f"python -m shards.index {split.root} makes it anew"
    if not name:
        raise InputError(f"{split.path(split.name + '.json')} names no file of {what}; {advice}")
    path = split.path(name)
    try:
        data = read_file(path)
    except OSError as error:
        raise InputError(f"cannot read the {what} of the split, {path}: {error.strerror or error}; {advice}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path} is damaged or of another packing: its sha256 is not the one in the index; {advice}")
    try:
        array = parse_npy(data)
    except ValueError as error:
        raise InputError(f"{path} is not a .npy file: {error}; {advice}") from None
    if array.dtype != dtype or array.shape != (split.nsamples,):
        raise InputError(
            f"{path} holds {array.dtype} of shape {array.shape}, not {dtype} of ({split.nsamples},); {advice}"
        )
    return array


def parse_npy(data: bytes) -> "np.ndarray":
    """The array of a .npy file. Raises ValueError if it is damaged or holds Python objects: nothing is unpickled."""
    import numpy as np

    file = io.BytesIO(data)
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.hasobject or len(data) - file.tell() != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes are not {dtype} of shape {shape}")
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy raises nearly everything for a damaged header
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def npy_bytes(values: "np.ndarray") -> bytes:
    """An array as the bytes of a .npy file."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def save_column(folder: str, name: str, values: "np.ndarray") -> str:
    """Write an array (`<split>.labels.npy`, int32; `<split>.crc32.npy`, uint32) and return the file's sha256."""
    data = npy_bytes(values)
    write_whole(os.path.join(folder, name), data)
    return hashlib.sha256(data).hexdigest()


def idx_path(tar: str) -> str:
    """Path of the index that belongs to a tar."""
    return tar.removesuffix(".tar") + ".idx"


def format_idx(samples: list[tuple[Member, ...]]) -> bytes:
    """Text of an .idx file: a header line, then one line per sample with `ext offset size name` of each member.

    Source: NVIDIA DALI 2.4, tools/wds2idx.py (format v1.2).
    """
    lines = [f"{INDEX_VERSION} {len(samples)}"]
    lines += [
        " ".join(f"{idx_word(m.ext)} {m.offset} {m.size} {idx_word(m.name)}" for m in sample) for sample in samples
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def idx_word(name: str) -> str:
    """A name as an .idx has it: white space, which would end a word there, is written as %20, %0A and the like."""
    if name.isprintable() and " " not in name:  # nearly all names
        return name
    return "".join(f"%{ord(c):02X}" if c in " \t\n\v\f\r" else c for c in name)


def read_idx(split: Split, shard: Shard) -> list[tuple[Member, ...]]:
    """Samples of a shard as its .idx lists them.

    Raises:
        InputError: there is no .idx, it is damaged, or <split>.json gives another number of samples.
    """
    path = split.idx_path(shard)
    try:
        samples = parse_idx(read_file(path), path)
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; python -m shards.index {split.root} makes it anew",
            everywhere=False,
        ) from None
    if len(samples) != shard.nsamples:
        raise InputError(
            f"{path} lists {len(samples)} samples, {split.name}.json {shard.nsamples}; "
            f"python -m shards.index {split.root} makes both anew",
            everywhere=False,
        )
    return samples


def parse_idx(data: bytes, path: str) -> list[tuple[Member, ...]]:
    """Samples of an .idx file, v1.1 (no names) or v1.2. Raises InputError, naming `path`, if it is damaged."""
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    try:
        version, count = lines[0].split(" ")
        width = {"v1.1": 3, "v1.2": 4}[version]
        samples = []
        for line in lines[1 : 1 + int(count)]:
            words = line.split(" ")
            if len(words) % width:
                raise ValueError(f"line {len(samples) + 2} has {len(words)} words")
            samples.append(
                tuple(
                    Member(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3] if width == 4 else "")
                    for i in range(0, len(words), width)
                )
            )
        if len(samples) != int(count):
            raise ValueError(f"{len(samples)} of {count} lines")
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(
            f"{path} is not a shard index (v1.1 or v1.2): {error}; python -m shards.index makes it anew",
            everywhere=False,
        ) from None
    return samples
