"""Makes the index of splits whose tars others packed: an .idx per tar, the labels, and `<split>.json`.

In: the tars of each split, and how labels are found. Out: what `shards.pack` would have written beside the tars, and a
few lines on stdout that say what was found and what was left out.
"""

import collections
import dataclasses
import glob
import itertools
import os
from collections.abc import Callable
from typing import NoReturn

import numpy as np

from shards.check import workers
from shards.check.samples import MAX_CLASSES, LabelRule, Problem, dots_hint
from shards.check.tars import TarContents, TarToIndex, index_tar
from shards.errors import InputError, few, short
from shards.format.names import STATE, missing_numbers
from shards.format.split import (
    BARE,
    Member,
    Shard,
    Split,
    idx_path,
    load_crc32,
    load_labels,
    load_split,
    parse_npy,
    save_index,
)
from shards.format.tar import open_tar, samples, window_read
from shards.machine.files import is_remote, read_file
from shards.machine.progress import Progress
from shards.read.planes import bare_bytes

_LOOKED_AT = 20  # samples that are searched for .cls members
_SHOWN_SAMPLES, _SHOWN_SHARDS = 5, 20  # problems of a split that are printed


@dataclasses.dataclass(frozen=True)
class IndexOptions:
    """What to index, and how."""

    dest: str  # folder or URL of the tars
    out: str  # folder for the index
    label_member: str = ""  # empty: as in an earlier index, or .cls
    label_key: str = ""
    classes: tuple[str, ...] = ()  # names, that of label 0 first; empty: not given
    skip_bad: bool = False
    processes: int = 1


@dataclasses.dataclass(frozen=True)
class _Indexed:
    """The index of one split before it is written: the split's classes depend on all splits."""

    split: Split
    labels: np.ndarray  # int32 (nsamples,)
    crc32: np.ndarray | None
    problems: list[Problem]  # of what was left out; those of whole shards come first


def index_splits(options: IndexOptions, tars: dict[str, list[str]]) -> None:
    """Read the tars of all splits, write their indexes, and print what they hold.

    Raises:
        InputError: something cannot be read, is damaged (unless `skip_bad`), or cannot be known from the data.
        OSError: a file cannot be written.
    """
    found = [_index_split(options, name, paths) for name, paths in tars.items()]
    # Splits of one data set share their classes: those of the split that has most.
    count = max(max(len(one.split.classes), int(one.labels.max()) + 1) for one in found)
    names = max((one.split.classes for one in found), key=len) or _numbered(count)
    for one in found:
        split = dataclasses.replace(one.split, classes=one.split.classes or names)
        _print_split(save_index(split, options.out, one.labels, one.crc32), one)


def _index_split(options: IndexOptions, name: str, tars: list[str]) -> _Indexed:
    """Read all tars of a split and write their .idx files."""
    if _is_unfinished(options.dest, name):
        raise InputError(
            f"the packing of split {name!r} in {options.dest} is not finished: run the same shards.pack command again"
        )
    old = _earlier(options.out, name)
    if old is None and options.out != options.dest:
        old = _earlier(options.dest, name)
    if old and old.classes == _numbered(len(old.classes)):  # not names, but what an earlier indexing made up
        old = dataclasses.replace(old, classes=())
    classes = options.classes or (old.classes if old else ())
    rule = _label_rule(options, [_path(options, tar) for tar in tars], old, classes)
    known = {shard.url: shard for shard in old.shards} if old else {}
    tasks = [_task(options, name, number, tar, known, rule) for number, tar in enumerate(tars)]
    found, problems = _read_tars(options, name, tasks)

    shards = []
    for task, tar, contents in zip(tasks, tars, found, strict=True):
        before = known.get(tar) or known.get(task.url)
        sha256 = before.sha256 if before and before.filesize == contents.filesize else ""
        idx = os.path.basename(task.idx) if task.idx != idx_path(task.path) else ""
        nsamples = len(contents.labels)
        shards.append(Shard(task.url, nsamples, contents.filesize, sha256, contents.bad, idx, contents.damaged))
    same_files = old is not None and [(s.filesize, s.nsamples, s.sha256) for s in old.shards] == [
        (s.filesize, s.nsamples, s.sha256) for s in shards
    ]
    encoding, height, width = _image_size(options, name, found, old, same_files)
    split = Split(
        name,
        options.out,
        tuple(shards),
        classes=classes,
        mean=_mean_file(options, old),
        encoding=encoding,
        height=height,
        width=width,
        label_member=rule.member,
        label_key=rule.key,
        extra=old.extra if old else {},
    )
    labels, crc32 = np.concatenate([contents.labels for contents in found]), None
    if old and same_files:
        crc32 = _column(load_crc32, old)
        if (old.label_member, old.label_key) == (rule.member, rule.key):
            _check_labels(split, labels, _column(load_labels, old))
    return _Indexed(split, labels, crc32, problems)


def _is_unfinished(dest: str, name: str) -> bool:
    """Whether shards.pack has begun a split in a folder and not finished it."""
    begun = glob.glob(f"{glob.escape(os.path.join(dest, STATE, name))}*")
    return not is_remote(dest) and begun != [] and not os.path.exists(os.path.join(dest, f"{name}.json"))


def _earlier(folder: str, name: str) -> Split | None:
    """An earlier index, for what the tars do not tell; None: there is none that can be read."""
    try:
        return load_split(folder, name)
    except InputError:
        return None


def _numbered(count: int) -> tuple[str, ...]:
    """Names of classes of which only the number is known."""
    return tuple(str(i) for i in range(count))


def _path(options: IndexOptions, tar: str) -> str:
    """Full path or URL of a tar, which is given relative to DEST."""
    return Split("", options.dest, ()).path(tar)


def _task(
    options: IndexOptions, name: str, number: int, tar: str, known: dict[str, Shard], rule: LabelRule
) -> TarToIndex:
    """How to index the tar of this number. `known`: shards of an earlier index by their URLs."""
    path = _path(options, tar)
    elsewhere = options.out != options.dest or is_remote(path)
    url = _absolute(path) if elsewhere else tar
    idx = os.path.join(options.out, f"{name}-{number:06d}.idx") if elsewhere else idx_path(path)
    before = known.get(tar) or known.get(url)
    same = before is not None and not is_remote(path) and _filesize(path) == before.filesize > 0
    bad, damaged = (before.bad, before.repaired) if same else ((), False)
    return TarToIndex(path, url, idx, rule, bad, damaged, options.skip_bad)


def _absolute(path: str) -> str:
    return path if is_remote(path) else os.path.abspath(path)


def _filesize(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _read_tars(options: IndexOptions, name: str, tasks: list[TarToIndex]) -> tuple[list[TarContents], list[Problem]]:
    """Contents of all tars of a split, and their problems, those of whole shards first.

    Raises:
        InputError: there is a problem that is not to be skipped, or no sample at all.
    """
    found = [TarContents()] * len(tasks)
    progress = Progress(len(tasks), "shards", f"indexing {name}")
    for number, contents in workers.run_tasks(index_tar, tasks, options.processes):
        found[number] = contents
        progress.add(1)
    progress.close()
    problems = sorted((p for contents in found for p in contents.problems), key=lambda p: p.sample >= 0)
    foreign = [contents.problems[0] for contents in found if contents.not_tar and contents.problems]
    if foreign or (problems and not options.skip_bad):
        _refuse(options.dest, foreign, problems)
    if not any(len(contents.labels) for contents in found):
        raise InputError(f"split {name!r} in {options.dest} has no sample with an image and a label")
    return found, problems


def _refuse(dest: str, foreign: list[Problem], problems: list[Problem]) -> NoReturn:
    """Print one line per damaged shard, and raise the error. `foreign`: problems of files that are not tars."""
    shards = [problem for problem in problems if problem.sample < 0]
    if len(shards) > 1:
        _print_problems(shards, _SHOWN_SHARDS)
    advice = "without such files the others can be indexed" if foreign else "--skip-bad leaves out what is damaged"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise InputError(f"{dest}: {(foreign or problems)[0]}{more}; {advice}")


# ---- what the tars do not tell ----------------------------------------------------------------------------------


def _label_rule(options: IndexOptions, paths: list[str], old: Split | None, classes: tuple[str, ...]) -> LabelRule:
    """Where labels are: as the options say, else as in the old index, else in .cls, if the first samples have that."""
    member, key = options.label_member, options.label_key
    if not member and not key and old:
        member, key = old.label_member, old.label_key
    if not member:
        member = "json" if key else "cls"
    rule = LabelRule(member.lower().lstrip("."), key, classes, len(classes) or MAX_CLASSES)
    if options.label_member or options.label_key or old:
        return rule
    first, members = next(((path, found) for path in paths if (found := _first_members(path))), ("", {}))
    if members and "cls" not in members:
        hint = "; if .json holds it, give --label-key FIELD" if "json" in members else ""
        hint = dots_hint(members.values()) or f"{hint}; --label-member EXT names another member"
        extensions = few(sorted("." + ext for ext in members), 4)
        raise InputError(f"{first}: its samples have members {extensions} and none is .cls{hint}")
    return rule


def _first_members(path: str) -> dict[str, Member]:
    """A member of each extension in the first samples of a tar."""
    try:
        with open_tar(path) as (read, size):
            first = itertools.islice(samples(window_read(read), size, damage=[]), _LOOKED_AT)
            return {member.ext.lower(): member for sample in first for member in sample}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _image_size(
    options: IndexOptions, name: str, found: list[TarContents], old: Split | None, same_files: bool
) -> tuple[str, int, int]:
    """Encoding, height and width for <split>.json: only what is known to be true of every image; else 0."""
    encodings = set().union(*(contents.encodings for contents in found))
    if len(encodings) > 1:
        kinds = " and ".join("image files" if e == "jpeg" else f"{e} images" for e in sorted(encodings, reverse=True))
        raise InputError(f"split {name!r} mixes {kinds}; index them as two splits with --splits")
    encoding = encodings.pop() if encodings else "jpeg"
    if encoding not in BARE:
        # Tar headers do not tell the size of an image. It stays known if these are the files of the old index.
        return ("jpeg", old.height, old.width) if old and same_files else ("jpeg", 0, 0)
    sizes = set().union(*(contents.bare_sizes for contents in found))
    shape = (old.height, old.width) if old and old.height else _mean_shape(options.dest)
    if sizes != {bare_bytes(encoding, *shape)}:
        raise InputError(
            f"split {name!r} has {encoding} images of {', '.join(str(s) for s in sorted(sizes)[:3])} bytes and nothing "
            f"tells their height and width; restore {name}.json or mean.npy beside them, or pack them again"
        )
    return encoding, *shape


def _mean_shape(dest: str) -> tuple[int, int]:
    """Height and width of the mean image; (0, 0): there is none."""
    try:
        mean = parse_npy(read_file(f"{dest.rstrip('/')}/mean.npy"))
    except (OSError, ValueError, InputError):
        return 0, 0
    return mean.shape[:2] if mean.ndim == 3 and mean.shape[2] == 3 else (0, 0)


def _mean_file(options: IndexOptions, old: Split | None) -> str:
    """The mean image as <split>.json will name it; empty: there is none."""
    mean = old.mean if old else ""
    if not mean and not is_remote(options.dest) and os.path.isfile(os.path.join(options.dest, "mean.npy")):
        mean = "mean.npy"
    return _absolute(_path(options, mean)) if mean and options.out != options.dest else mean


def _column(load: Callable[[Split], np.ndarray | None], old: Split) -> np.ndarray | None:
    """Labels or CRC-32s of an earlier index; None: it has none, or they cannot be read any more."""
    try:
        return load(old)
    except (InputError, OSError):
        return None


def _check_labels(split: Split, labels: np.ndarray, before: np.ndarray | None) -> None:
    """Raise InputError if a tar of unchanged size now gives another label: it is damaged."""
    if before is None or (labels == before).all():
        return
    place = int((labels != before).argmax())
    for shard in split.shards:
        if place < shard.nsamples:
            break
        place -= shard.nsamples
    raise InputError(
        f"{shard.url}: sample {place} has another label than when it was packed: the tar is damaged; "
        f"python -m shards.verify {split.root} --repair leaves out what is damaged. If its labels were changed on "
        f"purpose, delete {split.name}.json first"
    )


def read_classes(path: str) -> tuple[str, ...]:
    """Names of the classes in a text file, one per line, that of label 0 first. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            names = tuple(line.strip() for line in file.read().splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --classes {path}: {error}") from None
    if not names or not all(names):
        raise InputError(f"--classes {path}: each line must hold the name of a class, the first that of label 0")
    if len(set(names)) != len(names):
        (name, _), *_ = collections.Counter(names).most_common(1)
        raise InputError(f"--classes {path}: {short(name)!r} is there twice")
    return names


# ---- output -----------------------------------------------------------------------------------------------------


def _print_split(split: Split, indexed: _Indexed) -> None:
    """Print what a split holds, and what was left out of it."""
    size = sum(shard.filesize for shard in split.shards)
    print(
        f"{split.name}: {split.nsamples:,} samples in {len(split.shards)} shards ({size / 1e9:.2f} GB), "
        f"{len(split.classes)} classes"
    )
    empty = np.flatnonzero(np.bincount(indexed.labels, minlength=len(split.classes)) == 0)
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
    shards = sum(problem.sample < 0 for problem in indexed.problems)  # these come first
    _print_problems(indexed.problems[:shards], _SHOWN_SHARDS)
    _print_problems(indexed.problems[shards:], _SHOWN_SAMPLES)


def _print_problems(problems: list[Problem], most: int) -> None:
    for problem in problems[:most]:
        print(f"  {problem}")
    if len(problems) > most:
        print(f"  and {len(problems) - most:,} more")
