"""Indexes tar shards that others made: `.idx` beside each tar, `<split>.json` and the labels of each split.

In: a folder of WebDataset tars, or their URLs. Out: what `shards.pack` would have written beside them. Only headers
and labels are read. `python -m shards.index --help` tells how splits, images and labels are found.
"""

import argparse
import collections
import dataclasses
import glob
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NoReturn

from shards.check import workers
from shards.command import Parser, run
from shards.errors import InputError, few, printable, short
from shards.format.names import chosen_tars, missing_numbers, not_read
from shards.format.split import (
    Member,
    Shard,
    Split,
    format_idx,
    idx_path,
    image_member,
    load_crc32,
    load_fields,
    load_labels,
    parse_npy,
    parse_split,
    save_column,
    save_split,
)
from shards.format.tar import NotTar, TarError, open_tar, samples, split_name, window_read
from shards.machine.cores import cores_given
from shards.machine.files import is_remote, read_file, write_whole
from shards.machine.progress import Progress

if TYPE_CHECKING:
    import numpy as np

MAX_LABEL_BYTES = 1 << 20  # of a label member; a larger one is no label
MAX_CLASSES = 1 << 20  # a label beyond is damage or no label: class_counts would fill the memory
_REMOTE_WINDOW = 4 << 20  # bytes a request: over a network, many small requests cost more than the data between headers
_LOOKED_AT = 20  # samples, for whether there are labels in .cls
_SHOWN_SAMPLES, _SHOWN_SHARDS = 5, 20  # problems of a split that are reported in full

_EPILOG = """\
which split a tar belongs to:
  train-000000.tar, imagenet-train-0001.tar, train-0000-of-0128.tar, train/0000.tar: a word train, val, valid,
  validation or test in the name of the tar, else of its folder (one level deep), names the split; otherwise the name
  without its number does, or the folder. --splits NAME=PATTERN says it outright: a glob below DEST, or a path or URL
  with a range of numbers, {000000..000127}. Shards count in the order of their names, numbers as numbers.
samples:
  consecutive members with the same name up to the first dot. The image is the first .jpg .jpeg .png .webp (any case)
  or .raw; the label is the decimal text of .cls, or a field of .json (--label-key). Other members are left alone.
  A label that is no number is looked up in --classes.
"""


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """Where a sample's label stands."""

    member: str  # extension of the member, lower case
    key: str = ""  # field in it, where it is JSON
    names: tuple[str, ...] = ()  # classes that a label may name instead of its number
    classes: int = MAX_CLASSES  # labels are below this


class BadSample(Exception):
    """Why a sample cannot be used for training."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something wrong with a split. `sample`: number in the shard (-1: not one sample's), `key`: that sample's key."""

    kind: str  # tar, image, label, index, checksum, shard, key or count
    message: str
    shard: str = ""  # url
    sample: int = -1
    key: str = ""

    def __str__(self) -> str:
        place = self.shard + (f": sample {self.sample} (key {short(self.key)!r})" if self.sample >= 0 else "")
        return printable(f"{short(place, 150)}: {self.message}" if place else self.message)


@dataclasses.dataclass(frozen=True)
class _Task:
    path: str  # of the tar
    url: str  # as it will stand in <split>.json
    idx: str  # path to write the .idx to
    rule: LabelRule
    known_bad: tuple[int, ...]  # samples that an earlier verify --repair took out of this very file
    known_damage: bool
    skip_bad: bool


@dataclasses.dataclass
class Found:
    """What there is in a shard."""

    filesize: int
    labels: "np.ndarray"  # int32, a label a sample
    bad: tuple[int, ...]  # samples left out, in the tar's own numbering
    problems: list[Problem]
    repaired: bool
    encodings: set[str]
    raw_sizes: set[int]  # bytes of the raw images
    not_tar: bool = False  # a file of another kind


def read_label(data: bytes, rule: LabelRule) -> int:
    """The label in the bytes of a label member. Raises BadSample where there is none."""
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
    """Image and label member of a sample. Raises BadSample where one is missing or not the only one of its name."""
    extensions = collections.Counter(member.ext.lower() for member in sample)
    if len(extensions) < len(sample):
        twice = next(ext for ext, times in extensions.items() if times > 1)
        raise BadSample(f"it has two members .{short(twice)}{_dots_hint(sample)}")
    image = image_member(sample, encoding)
    label = next((member for member in sample if member.ext.lower() == rule.member), None)
    has = "" if image and label else f"it has {few(('.' + ext for ext in extensions), 4)}{_dots_hint(sample)}"
    if image is None:
        raise BadSample(f"it has no image member .jpg .jpeg .png .webp or .raw ({has})")
    if label is None:
        raise BadSample(f"it has no label member .{rule.member} ({has})")
    if not image.size:
        raise BadSample(f"its image .{short(image.ext)} is empty (0 bytes)")
    if label.size > MAX_LABEL_BYTES:
        raise BadSample(f".{rule.member} has {label.size} bytes, which is no label")
    return image, label


def _dots_hint(members: Iterable[Member]) -> str:
    """How to rename members if the stems of their file names seem to have dots, as in `img.001.jpg`; else empty."""
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
    """Key of a sample, by the name of its first member."""
    return split_name(sample[0].name)[0]


def encoding_of(sample: tuple[Member, ...]) -> str:
    """ "raw" or "jpeg" (an image file), as <split>.json has it, by the members of one sample."""
    return "raw" if image_member(sample, "jpeg") is None and image_member(sample, "raw") else "jpeg"


def _index_shard(task: _Task) -> Found:
    """Read one tar and write its .idx, unless something is wrong with it and is not to be skipped."""
    import numpy as np

    good: list[tuple[Member, ...]] = []
    found = Found(0, np.zeros(0, np.int32), (), [], False, set(), set())
    labels: list[int] = []
    bad: list[int] = []
    damage: list[TarError] = []
    try:
        with open_tar(task.path) as (read, found.filesize):
            read = window_read(read, _REMOTE_WINDOW) if is_remote(task.path) else window_read(read)
            for number, sample in enumerate(samples(read, found.filesize, damage=damage)):
                if number in task.known_bad:
                    bad.append(number)
                    continue
                try:
                    encoding = encoding_of(sample)
                    image, label = check_members(sample, task.rule, encoding)
                    labels.append(read_label(read(label.offset, label.size), task.rule))
                except BadSample as error:
                    found.problems.append(Problem("label", str(error), task.url, number, sample_key(sample)))
                    bad.append(number)
                    continue
                good.append(sample)
                found.encodings.add(encoding)
                if encoding == "raw":
                    found.raw_sizes.add(image.size)
    except OSError as error:
        raise InputError(f"cannot read {task.path}: {error.strerror or error}", everywhere=False) from None
    found.not_tar = any(isinstance(error, NotTar) for error in damage)
    if not task.known_damage and (wrong := _whole_shard(damage, good, found.problems)):
        found.problems.insert(0, Problem("tar", wrong, task.url))  # first: it is why samples lack a member
    found.labels, found.bad, found.repaired = np.array(labels, np.int32), tuple(bad), bool(bad or damage or not good)
    if not found.problems or (task.skip_bad and not found.not_tar):
        write_whole(task.idx, format_idx(good))
    return found


def _whole_shard(damage: list[TarError], good: list, bad: list[Problem]) -> str:
    """What is wrong with a shard, in one line. `good`: its samples, `bad`: the problems of those left out."""
    words = [damage[0].verdict] if damage else []
    if len(damage) > 1:
        words.append(f"{len(damage) - 1} further places are damaged")
    if not good and len(bad) != 1 and not (damage and damage[0].offset == 0):
        none = f"none of its {len(bad):,} samples can be used (the first: {bad[0].message})" if bad else ""
        words.append(none or "it holds no samples")
    return "; ".join(words)


def _old_split(dest: str, name: str) -> tuple[Split | None, dict]:
    """What an earlier <split>.json says, for what the tars do not tell; (None, {}) where there is none to be read."""
    try:
        fields = load_fields(dest, name)
        return parse_split(fields, name, dest, f"{name}.json"), fields
    except InputError:
        return None, {}


def extra_fields(fields: dict) -> dict:
    """Those fields of a <split>.json that `Split` does not hold and that stay true for an index made anew."""
    known = {"__kind__", "wids_version", "name", "shardlist", "classes", "mean", "image", "label", "class_counts"}
    known |= {"labels", "labels_sha256", "crc32", "crc32_sha256"}
    return {key: value for key, value in fields.items() if key not in known}


def save_index(split: Split, out: str, labels: "np.ndarray", crc32: "np.ndarray | None", extra: dict) -> Split:
    """Write `<split>.labels.npy`, `<split>.crc32.npy` and last `<split>.json` into `out`; the split as written."""
    import numpy as np

    name = f"{split.name}.labels.npy"
    split = dataclasses.replace(split, labels=name, labels_sha256=save_column(out, name, labels), crc32="")
    if crc32 is not None:
        name = f"{split.name}.crc32.npy"
        split = dataclasses.replace(split, crc32=name, crc32_sha256=save_column(out, name, crc32))
    counts = np.bincount(labels, minlength=len(split.classes)).tolist()
    save_split(split, os.path.join(out, f"{split.name}.json"), class_counts=counts, **extra)
    return split


def _label_rule(args: argparse.Namespace, paths: list[str], old: Split | None, names: tuple[str, ...]) -> LabelRule:
    """Where labels stand: as told, else as the old index has it, else as the first sample shows."""
    member, key = args.label_member, args.label_key
    if not member and not key and old:
        member, key = old.label_member, old.label_key
    if not member:
        member = "json" if key else "cls"
    limit = len(names) if names else MAX_CLASSES
    rule = LabelRule(member.lower().lstrip("."), key, names, limit)
    if not args.label_member and not args.label_key and not old:
        first, members = next(((path, found) for path in paths if (found := _first_members(path))), ("", {}))
        if members and "cls" not in members:
            hint = "; if .json holds it, give --label-key FIELD" if "json" in members else ""
            hint = _dots_hint(members.values()) or f"{hint}; --label-member EXT names another member"
            extensions = few(sorted("." + ext for ext in members), 4)
            raise InputError(f"{first}: its samples have members {extensions} and none is .cls{hint}")
    return rule


def _first_members(path: str) -> dict[str, Member]:
    """A member of each extension in a tar's first samples."""
    try:
        with open_tar(path) as (read, size):
            first = itertools.islice(samples(window_read(read), size, damage=[]), _LOOKED_AT)
            return {member.ext.lower(): member for sample in first for member in sample}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _read_classes(path: str) -> tuple[str, ...]:
    try:
        with open(path, encoding="utf-8") as file:
            names = tuple(line.strip() for line in file.read().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --classes {path}: {error}") from None
    if not names or not all(names):
        raise InputError(f"--classes {path}: expected the name of a class in each line, the first for label 0")
    if len(set(names)) != len(names):
        (name, _), *_ = collections.Counter(names).most_common(1)
        raise InputError(f"--classes {path}: {short(name)!r} stands there twice")
    return names


def _image_size(found: list[Found], name: str, old: Split | None, dest: str, same_files: bool) -> tuple[str, int, int]:
    """Encoding, height and width as <split>.json claims them: only what is known to be true of every image."""
    encodings = set().union(*(f.encodings for f in found))
    if len(encodings) > 1:
        raise InputError(f"split {name!r} mixes raw images and image files; index them as two splits with --splits")
    if encodings != {"raw"}:
        # Headers do not tell the size of an image; it stays known where these are the files of the old index.
        return ("jpeg", old.height, old.width) if old and same_files else ("jpeg", 0, 0)
    sizes = set().union(*(f.raw_sizes for f in found))
    shape = (old.height, old.width) if old and old.height else _mean_shape(dest)
    if sizes != {shape[0] * shape[1] * 3}:
        raise InputError(
            f"split {name!r} has raw images of {', '.join(str(s) for s in sorted(sizes)[:3])} bytes and nothing tells "
            f"their height and width; restore {name}.json or mean.npy beside them, or pack them again"
        )
    return "raw", *shape


def _mean_shape(dest: str) -> tuple[int, int]:
    """Height and width of the mean image; (0, 0) where there is none."""
    try:
        mean = parse_npy(read_file(f"{dest.rstrip('/')}/mean.npy"))
    except (OSError, ValueError, InputError):
        return 0, 0
    return mean.shape[:2] if mean.ndim == 3 and mean.shape[2] == 3 else (0, 0)


def is_unfinished(dest: str, name: str) -> bool:
    """Whether shards.pack has begun a split in a folder and not finished it."""
    from shards.write.shard import STATE

    return (
        not is_remote(dest)
        and glob.glob(f"{glob.escape(os.path.join(dest, STATE, name))}*") != []
        and not os.path.exists(os.path.join(dest, f"{name}.json"))
    )


def _index_split(
    args: argparse.Namespace, name: str, tars: list[str], classes: tuple[str, ...]
) -> tuple[Split, "np.ndarray", "np.ndarray | None", dict, list[Problem]]:
    """Read all tars of one split and write their .idx. The split's own files are written when all splits are read."""
    import numpy as np

    if is_unfinished(args.dest, name):
        raise InputError(
            f"the packing of split {name!r} in {args.dest} is not finished: run the same shards.pack command again"
        )
    old, old_fields = _old_split(args.out, name)
    if old is None and args.out != args.dest:
        old, old_fields = _old_split(args.dest, name)
    if old and old.classes == numbered(len(old.classes)):  # names by an earlier indexing, which knew no more
        old = dataclasses.replace(old, classes=())
    known = {shard.url: shard for shard in old.shards} if old else {}
    names = classes or (old.classes if old else ())
    rule = _label_rule(args, [Split(name, args.dest, ()).path(tar) for tar in tars], old, names)
    tasks = [_task(args, name, number, tar, known, rule) for number, tar in enumerate(tars)]

    found: list[Found] = [None] * len(tasks)
    progress = Progress(len(tasks), "shards", f"indexing {name}")
    for number, result in workers.run_tasks(_index_shard, tasks, args.workers):
        found[number] = result
        progress.add(1)
    progress.close()

    problems = sorted((p for result in found for p in result.problems), key=lambda p: p.sample >= 0)  # shards first
    foreign = [result.problems[0] for result in found if result.not_tar and result.problems]
    if foreign or (problems and not args.skip_bad):
        _refuse(args.dest, foreign, problems)
    if not sum(len(result.labels) for result in found):
        raise InputError(f"split {name!r} in {args.dest} has no sample with an image and a label")

    shards = []
    for task, tar, result in zip(tasks, tars, found, strict=True):
        before = known.get(tar) or known.get(task.url)
        sha256 = before.sha256 if before and before.filesize == result.filesize else ""
        idx = os.path.basename(task.idx) if task.idx != idx_path(task.path) else ""
        shards.append(Shard(task.url, len(result.labels), result.filesize, sha256, result.bad, idx, result.repaired))
    same_files = old is not None and [(s.filesize, s.nsamples, s.sha256) for s in old.shards] == [
        (s.filesize, s.nsamples, s.sha256) for s in shards
    ]
    encoding, height, width = _image_size(found, name, old, args.dest, same_files)
    split = Split(
        name,
        args.out,
        tuple(shards),
        classes=names,
        mean=_mean_file(args, old),
        encoding=encoding,
        height=height,
        width=width,
        label_member=rule.member,
        label_key=rule.key,
    )
    labels = np.concatenate([f.labels for f in found])
    crc32 = None
    if old and same_files:
        crc32 = _column_of(load_crc32, old)
        if (old.label_member, old.label_key) == (rule.member, rule.key):
            _check_labels(split, labels, _column_of(load_labels, old))
    return split, labels, crc32, extra_fields(old_fields), problems


def _task(
    args: argparse.Namespace, name: str, number: int, tar: str, known: dict[str, Shard], rule: LabelRule
) -> _Task:
    """How to index the tar of this number. `known`: shards of an earlier index by their URLs."""
    path = Split(name, args.dest, ()).path(tar)
    elsewhere = args.out != args.dest or is_remote(path)
    url = (path if is_remote(path) else os.path.abspath(path)) if elsewhere else tar
    idx = os.path.join(args.out, f"{name}-{number:06d}.idx") if elsewhere else idx_path(path)
    before = known.get(tar) or known.get(url)
    same = before is not None and not is_remote(path) and _filesize(path) == before.filesize > 0
    bad, damaged = (before.bad, before.repaired) if same else ((), False)
    return _Task(path, url, idx, rule, bad, damaged, args.skip_bad)


def _refuse(dest: str, foreign: list[Problem], problems: list[Problem]) -> NoReturn:
    """One line for each shard that is not whole, and the error. `foreign`: of files that are not tars."""
    shards = [problem for problem in problems if problem.sample < 0]
    if len(shards) > 1:
        _list(shards, _SHOWN_SHARDS)
    advice = (
        "--skip-bad indexes the samples that are whole"
        if not foreign
        else "without such files the others can be indexed"
    )
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise InputError(f"{dest}: {(foreign or problems)[0]}{more}; {advice}")


def _list(problems: list[Problem], most: int) -> None:
    for problem in problems[:most]:
        print(f"  {problem}")
    if len(problems) > most:
        print(f"  and {len(problems) - most:,} more")


def _column_of(load: Callable[[Split], "np.ndarray | None"], old: Split) -> "np.ndarray | None":
    try:
        return load(old)
    except (InputError, OSError):
        return None  # lost or damaged: that may be why the index is made anew


def _check_labels(split: Split, labels: "np.ndarray", before: "np.ndarray | None") -> None:
    """Raise InputError where a tar of unchanged size now gives another label: it is damaged."""
    if before is None or (labels == before).all():
        return
    place = int((labels != before).argmax())
    for shard in split.shards:
        if place < shard.nsamples:
            break
        place -= shard.nsamples
    raise InputError(
        f"{shard.url}: sample {place} has another label than when it was packed: the tar is damaged; "
        f"python -m shards.verify {split.root} --repair takes out what is. If its labels were changed on purpose, "
        f"delete {split.name}.json first"
    )


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes of which only the number is known."""
    return tuple(str(i) for i in range(count))


def _filesize(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _mean_file(args: argparse.Namespace, old: Split | None) -> str:
    mean = old.mean if old else ""
    if not mean and not is_remote(args.dest) and os.path.isfile(os.path.join(args.dest, "mean.npy")):
        mean = "mean.npy"
    if mean and args.out != args.dest:
        mean = Split("", args.dest, ()).path(mean)
        mean = mean if is_remote(mean) else os.path.abspath(mean)
    return mean


def _check_out(args: argparse.Namespace) -> None:
    if not is_remote(args.dest) and not os.path.isdir(args.dest):
        raise InputError(f"no folder {args.dest}")
    if args.out is None:
        if is_remote(args.dest):
            raise InputError(
                f"{args.dest} cannot be written to: give --out DIR for the index, then --data DIR to train"
            )
        args.out = args.dest
        if not os.access(args.dest, os.W_OK):
            raise InputError(
                f"no permission to write into {args.dest}: give --out DIR for the index, then --data DIR to train"
            )
    else:
        try:
            os.makedirs(args.out, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make --out {args.out}: {error.strerror}") from None


def parser() -> Parser:
    """Options of the command."""
    p = Parser(
        prog="python -m shards.index",
        description="Index WebDataset tar shards that others made, so that they train. Reads headers and labels only.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("dest", metavar="DEST", help="folder or URL of the shards; the index is written there")
    p.add_argument("--out", metavar="DIR", help="write the index here instead (DEST is read-only or remote)")
    p.add_argument("--splits", nargs="+", default=[], metavar="NAME=PATTERN", help="which tars make which split")
    p.add_argument("--label-member", default="", metavar="EXT", help="member with the label (cls)")
    p.add_argument("--label-key", default="", metavar="FIELD", help="the label is this field of the .json member")
    p.add_argument("--classes", metavar="FILE", help="names of the classes, one a line, that of label 0 first")
    p.add_argument("--skip-bad", action="store_true", help="leave out what is damaged or lacks image or label")
    p.add_argument("--workers", type=int, default=cores_given().count, metavar="N", help="processes (all cores)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Index all splits of DEST."""
    args = parser().parse_args(argv)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: at least 1")
    _check_out(args)
    classes = _read_classes(args.classes) if args.classes else ()
    started = time.monotonic()
    found = chosen_tars(args.dest, args.splits)
    if not found:
        others = not_read(args.dest)
        hint = f"; unpack {short(others[0])} to .tar first: compressed tars cannot be read at random" if others else ""
        raise InputError(f"no .tar in {args.dest} or one folder below{hint}")
    try:
        splits = [_index_split(args, name, tars, classes) for name, tars in found.items()]
        # Splits of one data set share their classes: those of the split that has most.
        count = max(max(len(split.classes), int(labels.max()) + 1) for split, labels, *_ in splits)
        names = max((split.classes for split, *_ in splits), key=len) or numbered(count)
        for split, labels, crc32, extra, problems in splits:
            split = dataclasses.replace(split, classes=split.classes or names)
            split = save_index(split, args.out, labels, crc32, extra)
            _report(split, labels, problems)
    except OSError as error:
        raise InputError(f"cannot write to {args.out}: {error.strerror or error}") from None
    others = not_read(args.dest) if not args.splits else []
    if others:
        print(f"note: not read, for the name does not end in .tar: {few(others, 4, ', ')}")
    print(f"indexed in {time.monotonic() - started:.1f} s")
    return 0


def _report(split: Split, labels: "np.ndarray", problems: list[Problem]) -> None:
    import numpy as np

    counts = np.bincount(labels, minlength=len(split.classes))
    size = sum(shard.filesize for shard in split.shards)
    print(
        f"{split.name}: {split.nsamples:,} samples in {len(split.shards)} shards ({size / 1e9:.2f} GB), "
        f"{len(split.classes)} classes"
    )
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        first = "; labels seem to count from 1" if list(empty) == [0] else f", the first {empty[0]}"
        print(f"  note: {len(empty)} classes have no sample{first}")
    left_out = sum(len(shard.bad) for shard in split.shards)
    if left_out:
        print(f"  note: {left_out} samples are left out")
    none = [shard.url for shard in split.shards if not shard.nsamples]
    if none:
        print(f"  note: {len(none)} shards give no sample: {few(none, separator=', ')}")
    for note in missing_numbers(shard.url for shard in split.shards):
        print(f"  note: {note}")
    shards = sum(problem.sample < 0 for problem in problems)  # these come first
    _list(problems[:shards], _SHOWN_SHARDS)
    _list(problems[shards:], _SHOWN_SAMPLES)


if __name__ == "__main__":
    run(main)
