"""Verifies shards: reads every byte, decodes every image, and compares all with what the index says.

In: a folder or URL of indexed shards. Out: a report that names each damaged shard and sample; exit code 2 if there is
one. With --repair a new index without the damaged samples; the tars are never written to.
"""

import ctypes
import dataclasses
import glob
import hashlib
import json
import os
import time
import zlib
from typing import TYPE_CHECKING

from shards.check import workers
from shards.command import Parser, run
from shards.errors import EXIT_BAD_INPUT, InputError, few
from shards.format.names import list_tars, missing_numbers, natural
from shards.format.split import (
    Member,
    Shard,
    Split,
    format_idx,
    idx_word,
    load_crc32,
    load_fields,
    load_labels,
    parse_idx,
    parse_npy,
    parse_split,
    read_idx,
)
from shards.format.tar import BLOCK, Read, TarError, open_tar, samples, window_read
from shards.index import (
    BadSample,
    LabelRule,
    Problem,
    check_members,
    extra_fields,
    read_label,
    sample_key,
    save_index,
)
from shards.machine import remote
from shards.machine.cores import cores_given
from shards.machine.files import is_remote, read_file, write_whole
from shards.machine.progress import Progress

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 4 << 20  # bytes a read of a tar
_KEPT = 4 << 20  # bytes kept behind the place that is read: headers are met before the data in front of them is used
_MAX_MEMBER = 256 << 20  # bytes of an image member; a larger one would fill the memory and is no photograph
_MAX_PROBLEMS = 1000  # of one shard that are listed; all are counted
_SHOWN = 20  # problems told in the report for people
_USUAL_SPLITS = ("train", "val", "test")  # tried where the files of a folder cannot be listed


@dataclasses.dataclass(frozen=True)
class _Task:
    split: Split
    shard: Shard
    labels: "np.ndarray | None"  # of the shard's samples, in .idx order; None: the split's file of them is of no use
    crc32: "np.ndarray | None"
    decode: bool
    repair: bool


@dataclasses.dataclass
class Report:
    """What was found in one shard. Arrays have an element a sound sample, in the order of the tar."""

    filesize: int = 0
    sha256: str = ""
    nsamples: int = 0  # that the tar holds, sound or not
    problems: list[Problem] = dataclasses.field(default_factory=list)
    more_problems: int = 0  # beyond those listed
    notes: list[str] = dataclasses.field(default_factory=list)
    missing: bool = False
    retries: int = 0  # connections that dropped and were taken up again
    repaired: bool = False  # samples or bytes of the tar are of no use
    bad: tuple[int, ...] = ()  # samples of no use, in the tar's own numbering
    idx: bytes = b""  # for --repair: an .idx of the sound samples
    numbers: "np.ndarray | None" = None  # int32, in the tar's own numbering
    labels: "np.ndarray | None" = None  # int32
    crc32: "np.ndarray | None" = None  # uint32
    keys: "np.ndarray | None" = None  # uint64 digests of the samples' keys

    def add(self, problem: Problem) -> None:
        """Note a problem, or only count it when there are too many."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)
        else:
            self.more_problems += 1


class _Stream:
    """Reads a tar from start to end once, hashing it, and gives out pieces near the place that has been reached."""

    def __init__(self, read: Read, size: int):
        self.sha256 = hashlib.sha256()
        self._read, self._size = read, size
        self._held, self._at = b"", 0  # bytes in memory and where they begin

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at `offset`, fewer only where the file ends."""
        end = min(offset + size, self._size)
        if offset < self._at:  # of a sample longer than what is kept
            return self._read(offset, max(0, end - offset))
        while (reached := self._at + len(self._held)) < end:
            chunk = self._read(reached, _CHUNK)
            if not chunk:
                break  # the file was cut off meanwhile
            self.sha256.update(chunk)
            drop = max(0, min(len(self._held) - _KEPT, offset - self._at))
            self._held, self._at = self._held[drop:] + chunk, self._at + drop
        return self._held[offset - self._at : end - self._at]

    def finish(self) -> str:
        """Read what is left; the sha256 of the whole file."""
        at = self._at + len(self._held)
        self._held = b""
        while at < self._size and (chunk := self._read(at, _CHUNK)):
            self.sha256.update(chunk)
            at += len(chunk)
        return self.sha256.hexdigest()


def _verify_shard(task: _Task) -> Report:
    """Check one shard in full."""
    split, shard = task.split, task.shard
    report = Report()
    retries = remote.retries
    path = split.path(shard.url)
    listed = None
    try:
        listed = read_idx(split, shard)
    except (InputError, FileNotFoundError) as error:
        report.add(Problem("index", str(error), shard.url))
    try:
        with open_tar(path) as (read, report.filesize):
            _check_tar(task, _Stream(read, report.filesize), listed, report)
    except FileNotFoundError:
        report.missing = True
        report.add(Problem("shard", "the tar is missing", shard.url))
    except OSError as error:
        report.missing = True
        report.add(Problem("shard", f"the tar cannot be read: {error.strerror or error}", shard.url))
    report.retries = remote.retries - retries
    return report


def _check_tar(task: _Task, stream: _Stream, listed: list[tuple[Member, ...]] | None, report: Report) -> None:
    import numpy as np

    split, shard = task.split, task.shard
    rule = LabelRule(split.label_member.lower(), split.label_key, split.classes, len(split.classes) or 1 << 31)
    by_offset = {sample[0].offset: i for i, sample in enumerate(listed or ()) if sample}
    expected = len(listed) if listed is not None else min(shard.nsamples, report.filesize // BLOCK)
    if expected < shard.nsamples:
        report.add(Problem("index", f"the tar cannot hold {shard.nsamples} samples", shard.url))
    met = np.zeros(expected, bool)  # which lines of the .idx have been found in the tar
    good: list[tuple[Member, ...]] = []
    numbers, labels, crcs, keys, bad = [], [], [], [], []
    damage: list[TarError] = []
    left_out = set(shard.bad)

    number, in_order = -1, -1
    for number, sample in enumerate(samples(stream.read, report.filesize, damage=damage)):
        if number in left_out:
            bad.append(number)
            continue
        in_order += 1
        # The line of the .idx, and so the place of the label: by the offset, and where the .idx is damaged or lost and
        # the tar is sound up to here, by counting.
        position = by_offset.get(sample[0].offset, -1)
        if position < 0 and not damage and in_order < expected and not met[in_order]:
            position = in_order
        try:
            if listed is not None:
                difference = _difference(sample, listed[position] if position >= 0 else ())
                if difference and damage:
                    raise BadSample("tar", difference)
                if difference:
                    report.add(Problem("index", difference, shard.url, number, sample_key(sample)))
            if position >= 0:
                met[position] = True
            label, crc = _check_sample(task, stream, sample, position, rule)
        except BadSample as error:
            kind, message = error.args if len(error.args) == 2 else ("label", error.args[0])
            report.add(Problem(kind, message, shard.url, number, sample_key(sample)))
            bad.append(number)
            continue
        good.append(sample)
        numbers.append(number)
        labels.append(label)
        crcs.append(crc)
        keys.append(int.from_bytes(hashlib.blake2b(_key_bytes(sample), digest_size=8).digest(), "little"))
    report.nsamples = number + 1
    wrong = [error.verdict for error in damage]
    if not report.nsamples and not damage:
        wrong.append("it holds no samples")
    if shard.repaired:
        report.notes += [f"{shard.url}: known damage: {what}" for what in wrong]
        wrong = []
    if not report.nsamples and expected:
        wrong.append(f"the index has {expected:,} samples, the tar none")
    for what in wrong:
        report.add(Problem("tar", what, shard.url))
    for position in np.flatnonzero(~met) if report.nsamples else ():
        key = sample_key(listed[position]) if listed and listed[position] else "?"
        report.add(Problem("tar", "the index has it, the tar does not", shard.url, int(position), key))
    _check_file(shard, stream.finish(), report)

    known_good = not shard.sha256 or report.sha256 == shard.sha256
    checked = (task.labels is not None or task.crc32 is not None) and (listed is not None or not damage)
    if not known_good and not checked:
        report.notes.append(f"{shard.url}: nothing can vouch for the labels in it: repair leaves out all its samples")
        bad += numbers
        good, numbers, labels, crcs, keys = [], [], [], [], []
    report.repaired = bool(bad or damage or not report.nsamples)
    report.bad = tuple(sorted(bad))
    report.numbers = np.array(numbers, np.int32)
    report.labels = np.array(labels, np.int32)
    report.crc32 = np.array(crcs, np.uint32)
    report.keys = np.array(keys, np.uint64)
    if task.repair:
        report.idx = format_idx(good)


def _key_bytes(sample: tuple[Member, ...]) -> bytes:
    return sample_key(sample).encode("utf-8", "surrogateescape")


def _check_file(shard: Shard, sha256: str, report: Report) -> None:
    """Size and digest of the whole tar."""
    report.sha256 = sha256
    if shard.filesize and report.filesize != shard.filesize:
        message = f"the tar has {report.filesize} bytes, the index says {shard.filesize}"
        report.add(Problem("checksum", message, shard.url))
    elif shard.sha256 and sha256 != shard.sha256:
        where = "" if report.problems else "; no sample is harmed as far as the index can tell"
        report.add(Problem("checksum", f"the tar's sha256 is not the one in the index{where}", shard.url))


def _difference(sample: tuple[Member, ...], line: tuple[Member, ...]) -> str:
    """What differs between the members found in the tar and those of the .idx; empty: nothing."""
    if not line:
        return "the .idx does not list it"
    found = [(idx_word(m.ext), m.offset, m.size, idx_word(m.name)) for m in sample]
    expected = [(m.ext, m.offset, m.size, m.name) for m in line]
    if found == expected:
        return ""
    if len(found) != len(expected):
        has, lists = (few("." + member.ext for member in side) for side in (sample, line))
        return f"the tar has {has} where the .idx lists {lists}"
    f, e = next((f, e) for f, e in zip(found, expected, strict=True) if f != e)
    return f"the tar has {few(map(str, f))} where the .idx lists {few(map(str, e))}"


def _check_sample(
    task: _Task, stream: _Stream, sample: tuple[Member, ...], position: int, rule: LabelRule
) -> tuple[int, int]:
    """Label and CRC-32 of a sample. Raises BadSample(kind, message) when it is damaged."""
    split = task.split
    crc, image_data, label_data = 0, b"", b""
    image, label_from = check_members(sample, rule, split.encoding)
    for member in sample:
        if member.size > _MAX_MEMBER:
            raise BadSample("image", f".{member.ext} has {member.size:,} bytes, which no image of a data set has")
        data = stream.read(member.offset, member.size)
        crc = zlib.crc32(data, crc)
        if member is image:
            image_data = data
        if member is label_from:
            label_data = data
    known_crc = task.crc32 is not None and position >= 0
    if known_crc and crc != task.crc32[position]:
        raise BadSample("checksum", f"its bytes have changed: CRC-32 {crc:08x}, not {task.crc32[position]:08x}")
    label = read_label(label_data, rule)
    if task.labels is not None and position >= 0 and label != task.labels[position]:
        raise BadSample("label", f"the tar says label {label}, {split.labels} {task.labels[position]}")
    if task.decode:
        _check_image(image_data, split)
    return label, crc


def _check_image(data: bytes, split: Split) -> None:
    """Decode an image in full."""
    from shards.read import images

    if split.encoding == "raw":
        if len(data) != split.height * split.width * 3:
            raise BadSample("image", f"raw image of {len(data)} bytes, not {split.height} x {split.width} x 3")
        return
    shape = None
    if images.simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width, colorspace, _ = images.simplejpeg.decode_jpeg_header(data)
            images.check_size(height, width)
            if colorspace != "CMYK":
                check_jpeg(data)
                shape = height, width
        except images.BadImage as error:
            raise BadSample("image", f"the image {error}") from None
        except ValueError:
            pass  # images.decode decides, as in training
    if shape is None:
        try:
            shape = images.decode(data).shape
        except images.BadImage as error:
            raise BadSample("image", f"the image {error}") from None
    if split.height and shape[:2] != (split.height, split.width):
        raise BadSample("image", f"the image is {shape[1]}x{shape[0]}, the index says {split.width}x{split.height}")


def check_jpeg(data: bytes) -> None:
    """Decode a JPEG and raise ValueError where any of it is damaged; other decoders fill in grey and go on.

    Every bit is decoded, and only what cannot fail (inverse DCT, colours) is left out: by jpeg.c that of all but
    one pixel; where that refuses, by libjpeg-turbo in grey at an eighth of the size. 256x256, one core: 7,300 and 5,400
    images/s instead of 3,700 in full.
    """
    from shards.read import fastjpeg
    from shards.read.images import jpeg_header, simplejpeg

    decoder, header = fastjpeg.decoder(), jpeg_header(data)
    if decoder is not None and header is not None:
        pixel = ctypes.create_string_buffer(3)
        if decoder.crop(data, header[:2], (0, 0), (1, 1), ctypes.addressof(pixel)):
            return
    simplejpeg.decode_jpeg(data, "GRAY", min_height=1, min_width=1, min_factor=8, strict=True)


@dataclasses.dataclass
class Result:
    """What was found in one split."""

    split: Split
    reports: list[Report]
    problems: list[Problem]  # of the split; those of a shard are in its report
    notes: list[str]
    seconds: float

    def all_problems(self) -> list[Problem]:
        """Problems of the split and of its shards."""
        return self.problems + [problem for report in self.reports for problem in report.problems]

    def count(self) -> int:
        """Number of problems, also of those not listed."""
        return len(self.all_problems()) + sum(report.more_problems for report in self.reports)


def verify_split(split: Split, fields: dict, count: int, decode: bool, repair: bool) -> Result:
    """Check all shards of a split with `count` processes. `fields`: its JSON. `repair`: let reports hold a new .idx."""

    problems: list[Problem] = []
    notes: list[str] = []
    columns: list = [None, None]
    for i, load in enumerate((load_labels, load_crc32)):
        try:
            columns[i] = load(split)
        except (InputError, OSError) as error:
            problems.append(Problem("index", str(error)))
    labels, crc32 = columns
    if not split.crc32 or any(not shard.sha256 for shard in split.shards):
        notes.append(
            f"{split.name}: not all checksums are recorded, so that changed pixels that still decode go unseen; "
            "--repair records them as the tars are now"
        )
    if len({split.path(shard.url) for shard in split.shards}) != len(split.shards):
        problems.append(Problem("shard", f"{split.name}.json lists a shard twice"))
    _check_counts(split, fields, labels, problems)
    _check_mean(split, problems)

    tasks, first = [], 0
    for shard in split.shards:
        part = slice(first, first + shard.nsamples)
        first = part.stop
        own = None if labels is None else labels[part], None if crc32 is None else crc32[part]
        tasks.append(_Task(dataclasses.replace(split, shards=()), shard, *own, decode, repair))
    started = time.monotonic()
    reports: list[Report] = [None] * len(tasks)
    progress = Progress(split.nsamples, what=f"verifying {split.name}")
    for number, report in workers.run_tasks(_verify_shard, tasks, count):
        reports[number] = report
        progress.add(report.nsamples)
    progress.close()
    result = Result(split, reports, problems, notes, time.monotonic() - started)
    for number, positions in _duplicates(result).items():
        shard, report = split.shards[number], reports[number]
        twice = report.numbers[positions].tolist()
        keys = _keys_of(split.path(shard.url), twice[:_MAX_PROBLEMS])
        for sample in twice:
            message = "the same sample, key and bytes, stands in this split twice"
            report.add(Problem("key", message, shard.url, sample, keys.get(sample, "")))
        if repair:
            _take_out(report, positions)
    notes += [f"{split.name}: {note}" for note in missing_numbers(shard.url for shard in split.shards)]
    left_out = sum(len(shard.bad) for shard in split.shards)
    if left_out:
        notes.append(f"{split.name}: {left_out} damaged samples were left out of the index before")
    return result


def _check_counts(split: Split, fields: dict, labels: "np.ndarray | None", problems: list[Problem]) -> None:
    """class_counts of <split>.json against the labels."""
    import numpy as np

    counts = fields.get("class_counts")
    if counts is None or labels is None:
        return
    if counts != np.bincount(labels, minlength=len(split.classes)).tolist():
        problems.append(Problem("count", f"class_counts in {split.name}.json are not those of {split.labels}"))


def _check_mean(split: Split, problems: list[Problem]) -> None:
    import numpy as np

    if not split.mean:
        return
    path = split.path(split.mean)
    try:
        mean = parse_npy(read_file(path))
        expected = (split.height, split.width, 3) if split.height else mean.shape
        if mean.dtype != np.float32 or mean.ndim != 3 or mean.shape != expected or not np.isfinite(mean).all():
            problems.append(Problem("index", f"{path} is not a float32 image of {expected}"))
    except (OSError, ValueError, InputError) as error:
        problems.append(Problem("index", f"the mean image {path} cannot be read: {error}"))


def _duplicates(result: Result) -> dict[int, "np.ndarray"]:
    """Of each shard that has any: the places among its sound samples whose key and bytes an earlier sample has.

    Equal keys with other bytes are a note only: people number the samples of each shard from 0.
    """
    import numpy as np

    present = [(number, report) for number, report in enumerate(result.reports) if not report.missing]
    if not present:
        return {}
    keys = np.concatenate([report.keys for _, report in present])
    crcs = np.concatenate([report.crc32 for _, report in present])
    shards = np.concatenate([np.full(len(report.keys), number) for number, report in present])
    places = np.concatenate([np.arange(len(report.keys)) for _, report in present])
    order = np.lexsort((np.arange(len(keys)), crcs, keys))
    same_key = keys[order][1:] == keys[order][:-1]
    same_all = same_key & (crcs[order][1:] == crcs[order][:-1])
    if (same_key & ~same_all).any():
        result.notes.append(f"{result.split.name}: {int((same_key & ~same_all).sum())} keys name several samples")
    twice = np.sort(order[1:][same_all])
    return {int(number): places[twice[shards[twice] == number]] for number in np.unique(shards[twice])}


def _keys_of(path: str, numbers: list[int]) -> dict[int, str]:
    """Keys of some samples, looked up in their tar: of all samples only digests of the keys are kept in memory."""
    wanted = set(numbers)
    with open_tar(path) as (read, size):
        found = enumerate(samples(window_read(read), size, damage=[]))
        return {number: sample_key(sample) for number, sample in found if number in wanted}


def _take_out(report: Report, positions: "np.ndarray") -> None:
    """Take more samples out of a shard's new index."""
    import numpy as np

    gone = set(positions.tolist())
    lines = parse_idx(report.idx, "the new index")
    report.idx = format_idx([line for place, line in enumerate(lines) if place not in gone])
    report.bad = tuple(sorted((*report.bad, *report.numbers[positions].tolist())))
    report.repaired = True
    for name in ("numbers", "labels", "crc32", "keys"):
        setattr(report, name, np.delete(getattr(report, name), positions))


def _idx_to_write(split: Split, shard: Shard) -> str:
    """Path of a shard's .idx, if it lies in the split's own folder: an index cannot have files written elsewhere."""
    path = split.idx_path(shard)
    root = os.path.realpath(split.root)
    if is_remote(path) or os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise InputError(
            f"--repair does not write {path}, outside {split.root}: index into another folder first, "
            f"python -m shards.index {split.root} --out DIR, and repair that"
        )
    return path


def repair_split(result: Result, fields: dict) -> Split | None:
    """Write an index of the sound samples only. None: nothing had to be written. Tars are not touched."""
    import numpy as np

    split = result.split
    kept = [(shard, report) for shard, report in zip(split.shards, result.reports, strict=True) if not report.missing]
    complete = split.crc32 and all(shard.sha256 for shard in split.shards)
    if not result.count() and complete:
        return None
    if not sum(len(report.labels) for _, report in kept):
        raise InputError(f"no sample of split {split.name!r} is sound; pack it again")
    paths = [_idx_to_write(split, shard) for shard, _ in kept]
    shards = tuple(
        dataclasses.replace(
            shard,
            nsamples=len(report.labels),
            filesize=report.filesize,
            sha256=report.sha256,
            bad=report.bad,
            repaired=report.repaired,
        )
        for shard, report in kept
    )
    labels = np.concatenate([report.labels for _, report in kept])
    crc32 = np.concatenate([report.crc32 for _, report in kept])
    for path, (_, report) in zip(paths, kept, strict=True):
        write_whole(path, report.idx)
    return save_index(dataclasses.replace(split, shards=shards), split.root, labels, crc32, extra_fields(fields))


def find_splits(dest: str, names: list[str]) -> dict[str, dict]:
    """JSON of the indexes in a folder by split: those named, or all there are.

    Raises:
        InputError: none, or one cannot be read.
    """
    if names:
        return {name: load_fields(dest, name) for name in names}
    if is_remote(dest):
        found = {}
        for name in _USUAL_SPLITS:
            try:
                found[name] = json.loads(read_file(f"{dest.rstrip('/')}/{name}.json"))
            except FileNotFoundError:
                continue
            except ValueError as error:
                raise InputError(f"{dest}/{name}.json is not JSON: {error}") from None
        if not found:
            raise InputError(f"there is no {', '.join(_USUAL_SPLITS)}.json at {dest}; name the split with --split")
        return found
    if not os.path.isdir(dest):
        raise InputError(f"no folder {dest}")
    found = {}
    for path in sorted(glob.glob("*.json", root_dir=dest)):
        name = path.removesuffix(".json")
        try:
            fields = load_fields(dest, name)
        except InputError:
            if name in _USUAL_SPLITS or glob.glob(f"{glob.escape(os.path.join(dest, name))}-[0-9]*.tar"):
                raise
            continue  # some other JSON
        if "shardlist" in fields:
            found[name] = fields
    if not found:
        hint = f": make one with python -m shards.index {dest}" if list_tars(dest) else ", nor a tar"
        raise InputError(f"{dest} has no shard index{hint}")
    return found


def _orphans(dest: str, splits: list[Split], named: bool) -> list[Problem]:
    """Tars in the folder that no index lists, and such an .idx without its tar."""
    if is_remote(dest) or named:
        return []
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


def parser() -> Parser:
    """Options of the command."""
    p = Parser(
        prog="python -m shards.verify",
        description="Read every byte of indexed shards, decode every image, compare all with the index. Exit code 2 "
        "when anything is wrong.",
    )
    p.add_argument("dest", metavar="DEST", help="folder or URL that holds <split>.json")
    p.add_argument("--split", nargs="+", default=[], metavar="NAME", help="these splits only (all)")
    p.add_argument("--workers", type=int, default=cores_given().count, metavar="N", help="processes (all cores)")
    p.add_argument("--no-decode", action="store_true", help="checksums, structure and labels only, at the disk's speed")
    p.add_argument(
        "--repair",
        action="store_true",
        help="write a new index that leaves out what is damaged and records checksums; the tars are not touched",
    )
    p.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return p


def main(argv: list[str] | None = None) -> int:
    """Verify the splits of DEST; 2 if anything is wrong that --repair did not mend."""
    args = parser().parse_args(argv)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: at least 1")
    if args.repair and args.no_decode:
        raise InputError("--repair has to decode the images: leave out --no-decode")
    if args.repair and (is_remote(args.dest) or not os.access(args.dest, os.W_OK)):
        raise InputError(
            f"--repair cannot write into {args.dest}: index into another folder first, "
            f"python -m shards.index {args.dest} --out DIR, and repair that"
        )
    fields = find_splits(args.dest, args.split)
    splits = [parse_split(f, name, args.dest, f"{args.dest}/{name}.json") for name, f in fields.items()]
    results = [
        verify_split(split, fields[split.name], args.workers, not args.no_decode, args.repair) for split in splits
    ]
    orphans = _orphans(args.dest, splits, bool(args.split))
    repaired = {}
    if args.repair:
        for result in results:
            try:
                new = repair_split(result, fields[result.split.name])
            except OSError as error:
                raise InputError(f"--repair cannot write into {args.dest}: {error.strerror or error}") from None
            if new:
                repaired[new.name] = new
    report = _summary(results, orphans, repaired)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 0 if report["ok"] else EXIT_BAD_INPUT


def _summary(results: list[Result], orphans: list[Problem], repaired: dict[str, Split]) -> dict:
    """The report: plain lists and dictionaries, as --json prints it."""
    problems, splits, notes = [], {}, []
    for result in results:
        split = result.split
        new = repaired.get(split.name)
        splits[split.name] = {
            "shards": len(split.shards),
            "samples": split.nsamples,
            "bytes": sum(report.filesize for report in result.reports),
            "classes": len(split.classes),
            "problems": result.count(),
            "repaired": new is not None,
            "samples_left": new.nsamples if new else split.nsamples,
        }
        notes += result.notes + [note for report in result.reports for note in report.notes]
        problems += [{"split": split.name, **dataclasses.asdict(problem)} for problem in result.all_problems()]
    problems += [{"split": "", **dataclasses.asdict(problem)} for problem in orphans]
    count = sum(result.count() for result in results) + len(orphans)
    left = len(orphans) + sum(result.count() for result in results if result.split.name not in repaired)
    size = sum(split["bytes"] for split in splits.values())
    seconds = sum(result.seconds for result in results)
    retries = sum(report.retries for result in results for report in result.reports)
    if retries:
        notes.append(f"{retries} dropped connections were taken up again")
    return {
        "ok": left == 0,
        "splits": splits,
        "problem_count": count,
        "problems": problems,
        "notes": notes,
        "bytes": size,
        "seconds": round(seconds, 3),
        "mb_per_second": round(size / 1e6 / max(seconds, 1e-9), 1),
    }


def _print(report: dict) -> None:
    """The report for people."""
    for name, split in report["splits"].items():
        state = f"{split['problems']} PROBLEMS" if split["problems"] else "ok"
        print(
            f"{name}: {split['samples']:,} samples in {split['shards']} shards, {split['classes']} classes, "
            f"{split['bytes'] / 1e6:,.1f} MB: {state}"
        )
    for fields in sorted(report["problems"], key=lambda fields: fields["sample"] >= 0)[:_SHOWN]:  # shards first
        split = fields.pop("split")
        print(f"  {split + ': ' if split else ''}{Problem(**fields)}")
    if report["problem_count"] > _SHOWN:
        print(f"  and {report['problem_count'] - _SHOWN} more; --json lists them")
    for note in report["notes"]:
        print(f"  note: {note}")
    for name, split in report["splits"].items():
        if split["repaired"]:
            print(f"{name}: wrote a new index of {split['samples_left']:,} samples of {split['samples']:,}")
    print(f"read in {report['seconds']:.1f} s, {report['mb_per_second']:,.1f} MB/s")


if __name__ == "__main__":
    run(main)
