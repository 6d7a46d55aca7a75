"""Checks all splits of a folder: each shard, the files of the index, samples that are there twice, files of no split.

In: a folder or URL that holds `<split>.json`. Out: a `SplitReport` for each split.
"""

import dataclasses
import glob
import os
import time

import numpy as np

from shards.check import workers
from shards.check.samples import Problem, sample_key
from shards.check.shard import MOST_PROBLEMS, ShardReport, ShardToCheck, check_shard
from shards.errors import InputError
from shards.format.names import list_tars, missing_numbers, natural
from shards.format.split import Split, load_crc32, load_fields, load_labels, load_split, parse_npy, parse_split
from shards.format.tar import open_tar, samples, window_read
from shards.machine import remote
from shards.machine.files import is_remote, read_file
from shards.machine.progress import Progress

_USUAL_SPLITS = ("train", "val", "test")  # tried where the files of a folder cannot be listed


@dataclasses.dataclass
class SplitReport:
    """What was found in one split."""

    split: Split
    shards: list[ShardReport] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)  # of the split itself
    notes: list[str] = dataclasses.field(default_factory=list)
    repeats: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # see _repeats
    seconds: float = 0.0

    def add(self, kind: str, message: str) -> None:
        """Note a problem of the split itself."""
        self.problems.append(Problem(kind, message))

    def all_problems(self) -> list[Problem]:
        """Problems of the split and of its shards."""
        return self.problems + [problem for report in self.shards for problem in report.problems]

    @property
    def count(self) -> int:
        """Number of problems, including those that are not listed."""
        return len(self.problems) + sum(report.count for report in self.shards)


def check_split(split: Split, processes: int, decode: bool, repair: bool) -> SplitReport:
    """Check all shards of a split. `repair`: the shards' reports hold new .idx files."""
    found = SplitReport(split)
    labels, crc32 = (_column(load, split, found) for load in (load_labels, load_crc32))
    if not split.crc32 or any(not shard.sha256 for shard in split.shards):
        found.notes.append(
            f"{split.name}: not all checksums are recorded, so changed pixels that still decode are not found; "
            "--repair records them as the tars are now"
        )
    if len({split.path(shard.url) for shard in split.shards}) != len(split.shards):
        found.add("shard", f"{split.name}.json lists a shard twice")
    counts = split.extra.get("class_counts")
    if counts is not None and labels is not None:
        if counts != np.bincount(labels, minlength=len(split.classes)).tolist():
            found.add("count", f"class_counts in {split.name}.json are not those of {split.labels}")
    _check_mean(found)

    tasks, first = [], 0
    for shard in split.shards:
        part = slice(first, first + shard.nsamples)
        first = part.stop
        own = (None if column is None else column[part] for column in (labels, crc32))
        tasks.append(ShardToCheck(dataclasses.replace(split, shards=()), shard, *own, decode, repair))
    started = time.monotonic()
    found.shards = [ShardReport()] * len(tasks)
    progress = Progress(split.nsamples, what=f"verifying {split.name}")
    for number, report in workers.run_tasks(check_shard, tasks, processes):
        found.shards[number] = report
        progress.add(report.nsamples)
    progress.close()
    found.seconds = time.monotonic() - started
    _check_repeats(found)
    found.notes += [f"{split.name}: {note}" for note in missing_numbers(shard.url for shard in split.shards)]
    left_out = sum(len(shard.bad) for shard in split.shards)
    if left_out:
        found.notes.append(f"{split.name}: {left_out} damaged samples were left out of the index before")
    return found


def _column(load, split: Split, found: SplitReport) -> np.ndarray | None:
    """Labels or CRC-32s of a split; None: the file cannot be used, which is a problem, or there is none."""
    try:
        return load(split)
    except (InputError, OSError) as error:
        found.add("index", str(error))
        return None


def _check_mean(found: SplitReport) -> None:
    split = found.split
    if not split.mean:
        return
    path = split.path(split.mean)
    try:
        mean = parse_npy(read_file(path))
        expected = (split.height, split.width, 3) if split.height else mean.shape
        if mean.dtype != np.float32 or mean.ndim != 3 or mean.shape != expected or not np.isfinite(mean).all():
            found.add("index", f"{path} is not a float32 image of {expected}")
    except (OSError, ValueError, InputError) as error:
        found.add("index", f"the mean image {path} cannot be read: {error}")


def _check_repeats(found: SplitReport) -> None:
    """Report samples whose key and bytes an earlier sample of the split has."""
    found.repeats, names = _repeats(found.shards)
    if names:  # a note only: people number the samples of each shard from 0
        found.notes.append(f"{found.split.name}: {names} keys name several samples")
    for number, positions in found.repeats.items():
        shard, report = found.split.shards[number], found.shards[number]
        twice = report.sound["number"][positions].tolist()
        keys = _keys_of(found.split.path(shard.url), twice[:MOST_PROBLEMS])
        for sample in twice:
            message = "the same sample, with the same key and bytes, is in this split twice"
            report.add("key", message, shard, sample, keys.get(sample, ""))


def _repeats(reports: list[ShardReport]) -> tuple[dict[int, np.ndarray], int]:
    """By number of the shard: positions in its `sound` of samples that an earlier sample equals in key and bytes.

    Also the number of times that samples with other bytes have the same key.
    """
    sound = np.concatenate([report.sound for report in reports])
    keys, crc32 = sound["key"], sound["crc32"]
    order = np.lexsort((np.arange(len(sound)), crc32, keys))
    same_key = keys[order][1:] == keys[order][:-1]
    same = same_key & (crc32[order][1:] == crc32[order][:-1])
    twice = np.sort(order[1:][same])
    starts = np.cumsum([0] + [len(report.sound) for report in reports])
    parts = np.split(twice, np.searchsorted(twice, starts[1:-1]))
    return {n: part - starts[n] for n, part in enumerate(parts) if len(part)}, int((same_key & ~same).sum())


def _keys_of(path: str, numbers: list[int]) -> dict[int, str]:
    """Keys of some samples, read from their tar: only digests of all samples' keys are kept in memory."""
    wanted = set(numbers)
    with open_tar(path) as (read, size):
        found = enumerate(samples(window_read(read), size, damage=[]))
        return {number: sample_key(sample) for number, sample in found if number in wanted}


def find_splits(dest: str, names: list[str]) -> list[Split]:
    """The splits in a folder or at a URL: those named, or all.

    Raises:
        InputError: there is none, or one cannot be read.
    """
    if not names and is_remote(dest):
        names = [name for name in _USUAL_SPLITS if _is_there(f"{dest.rstrip('/')}/{name}.json")]
        if not names:
            raise InputError(f"there is no {', '.join(_USUAL_SPLITS)}.json at {dest}; name the split with --split")
    if names:
        return [load_split(dest, name) for name in names]
    if not os.path.isdir(dest):
        raise InputError(f"no folder {dest}")
    found = []
    for path in sorted(glob.glob("*.json", root_dir=dest)):
        name = path.removesuffix(".json")
        try:
            fields = load_fields(dest, name)
        except InputError:
            if name in _USUAL_SPLITS or glob.glob(f"{glob.escape(os.path.join(dest, name))}-[0-9]*.tar"):
                raise
            continue  # some other JSON
        if "shardlist" in fields:
            found.append(parse_split(fields, name, dest, f"{dest}/{path}"))
    if not found:
        hint = f": make one with python -m shards.index {dest}" if list_tars(dest) else ", nor a tar"
        raise InputError(f"{dest} has no shard index{hint}")
    return found


def _is_there(url: str) -> bool:
    try:
        return remote.size_of(url) >= 0
    except FileNotFoundError:
        return False


def files_of_no_split(dest: str, splits: list[Split]) -> list[Problem]:
    """Tars in a local folder that no index lists, and each .idx whose tar is not there."""
    listed = {os.path.realpath(split.path(shard.url)) for split in splits for shard in split.shards}
    problems = []
    for tar in sorted(list_tars(dest), key=natural):
        if os.path.realpath(os.path.join(dest, tar)) not in listed:
            problems.append(Problem("shard", f"no index lists it; python -m shards.index {dest} adds it", tar))
    indexes = {os.path.realpath(split.idx_path(shard)) for split in splits for shard in split.shards}
    for idx in sorted(glob.glob("*.idx", root_dir=dest), key=natural):
        tar = idx.removesuffix(".idx") + ".tar"
        if os.path.realpath(os.path.join(dest, idx)) not in indexes and not os.path.exists(os.path.join(dest, tar)):
            problems.append(Problem("shard", "an .idx without its tar", idx))
    return problems
