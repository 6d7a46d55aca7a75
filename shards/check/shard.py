"""Checks one shard against the index: every byte of the tar, every label, every image.

In: a shard, and the labels and CRC-32s that the index has for it. Out: a `ShardReport`: what is wrong, and what a new
index of the sound samples needs.
"""

import dataclasses
import hashlib
import zlib

import numpy as np

from shards.check.images import check_image
from shards.check.samples import BadSample, LabelRule, Problem, check_members, read_label, sample_key
from shards.errors import InputError, few
from shards.format.split import Member, Shard, Split, format_idx, idx_word, read_idx
from shards.format.tar import BLOCK, Read, TarError, open_tar, samples
from shards.machine import remote

# A sound sample: its number in the tar, its label, the CRC-32 of its members' data, a digest of its key.
SOUND = np.dtype([("number", "<i4"), ("label", "<i4"), ("crc32", "<u4"), ("key", "<u8")])
MOST_PROBLEMS = 1000  # of one shard that are listed; the others are only counted

_CHUNK = 4 << 20  # bytes per read of a tar
_KEPT = 4 << 20  # bytes kept before the place that is read: a header is read before the data that precede it are used
_MAX_MEMBER = 256 << 20  # bytes; a larger image member would fill the memory, and is no photograph


@dataclasses.dataclass(frozen=True)
class ShardToCheck:
    """A shard and what the index says of it."""

    split: Split  # without its list of shards
    shard: Shard
    labels: np.ndarray | None  # int32 (shard.nsamples,) in .idx order; None: the file of labels cannot be used
    crc32: np.ndarray | None  # uint32 (shard.nsamples,), likewise
    decode: bool
    repair: bool  # the report shall hold a new .idx


@dataclasses.dataclass
class ShardReport:
    """What was found in one shard."""

    filesize: int = 0
    sha256: str = ""
    nsamples: int = 0  # samples in the tar, sound or not
    problems: list[Problem] = dataclasses.field(default_factory=list)
    count: int = 0  # of problems, including those that are not listed
    notes: list[str] = dataclasses.field(default_factory=list)
    missing: bool = False
    retries: int = 0  # dropped connections that were resumed
    damaged: bool = False  # there are samples or bytes of the tar that cannot be used
    bad: tuple[int, ...] = ()  # samples that cannot be used, numbered as in the tar
    idx: bytes = b""  # an .idx of the sound samples, for a repair
    sound: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, SOUND))  # in the order of the tar

    def add(self, kind: str, message: str, shard: Shard, sample: int = -1, key: str = "") -> None:
        """Note a problem, or only count it when there are too many."""
        self.count += 1
        if self.count <= MOST_PROBLEMS:
            self.problems.append(Problem(kind, message, shard.url, sample, key))


def check_shard(task: ShardToCheck) -> ShardReport:
    """Check one shard in full."""
    report, shard, retries = ShardReport(), task.shard, remote.retries
    listed = None
    try:
        listed = read_idx(task.split, shard)
    except (InputError, FileNotFoundError) as error:
        report.add("index", str(error), shard)
    try:
        with open_tar(task.split.path(shard.url)) as (read, report.filesize):
            _check_tar(task, _HashedTar(read, report.filesize), listed, report)
    except OSError as error:
        report.missing = True
        gone = isinstance(error, FileNotFoundError)
        report.add("shard", f"the tar {'is missing' if gone else f'cannot be read: {error.strerror or error}'}", shard)
    report.retries = remote.retries - retries
    return report


class _HashedTar:
    """Reads a tar once from start to end and hashes it; gives out pieces near the place that has been reached."""

    def __init__(self, read: Read, size: int):
        self._read, self._size = read, size
        self._sha256 = hashlib.sha256()
        self._held, self._at = b"", 0  # bytes in memory and where they begin

    def read(self, offset: int, size: int) -> bytes:
        """Bytes at `offset`; fewer only where the file ends."""
        end = min(offset + size, self._size)
        if offset < self._at:  # of a sample longer than what is kept
            return self._read(offset, max(0, end - offset))
        while (reached := self._at + len(self._held)) < end:
            chunk = self._read(reached, _CHUNK)
            if not chunk:
                break  # the file was cut off meanwhile
            self._sha256.update(chunk)
            drop = max(0, min(len(self._held) - _KEPT, offset - self._at))
            self._held, self._at = self._held[drop:] + chunk, self._at + drop
        return self._held[offset - self._at : end - self._at]

    def sha256(self) -> str:
        """Read the rest; the hex digest of the whole file."""
        at = self._at + len(self._held)
        self._held = b""
        while at < self._size and (chunk := self._read(at, _CHUNK)):
            self._sha256.update(chunk)
            at += len(chunk)
        return self._sha256.hexdigest()


class _Lines:
    """The lines of a shard's .idx: which of them belongs to a sample of the tar, and so which label and CRC-32.

    `listed`: the samples of the .idx; None: there is none that can be read. `count`: samples that the index has.
    """

    def __init__(self, listed: list[tuple[Member, ...]] | None, count: int):
        self.listed = listed
        self.met = np.zeros(count, bool)  # the lines that have been found in the tar
        self._by_offset = {sample[0].offset: i for i, sample in enumerate(listed or ()) if sample}

    def find(self, sample: tuple[Member, ...], order: int, damage: bool) -> int:
        """Number of the sample's line; -1: it has none.

        By the offset. Where the .idx is damaged or lost, and the tar has been sound so far, by counting: `order`.
        """
        line = self._by_offset.get(sample[0].offset, -1)
        if line < 0 and not damage and order < len(self.met) and not self.met[order]:
            line = order
        return line

    def difference(self, sample: tuple[Member, ...], line: int) -> str:
        """What differs between the members in the tar and those in a line; empty: nothing."""
        if self.listed is None:
            return ""
        if line < 0 or not self.listed[line]:
            return "the .idx does not list it"
        found = [(idx_word(m.ext), m.offset, m.size, idx_word(m.name)) for m in sample]
        expected = [(m.ext, m.offset, m.size, m.name) for m in self.listed[line]]
        if len(found) != len(expected):
            has, lists = (few("." + member.ext for member in side) for side in (sample, self.listed[line]))
            return f"the tar has {has} where the .idx lists {lists}"
        for f, e in zip(found, expected, strict=True):
            if f != e:
                return f"the tar has {few(map(str, f))} where the .idx lists {few(map(str, e))}"
        return ""

    def not_met(self) -> list[tuple[int, str]]:
        """Number and key of each line of which the tar has no sample."""
        rest = np.flatnonzero(~self.met).tolist()
        return [(n, sample_key(self.listed[n]) if self.listed and self.listed[n] else "?") for n in rest]


def _check_tar(
    task: ShardToCheck, tar: _HashedTar, listed: list[tuple[Member, ...]] | None, report: ShardReport
) -> None:
    """Check what the tar holds, and fill in the report."""
    shard = task.shard
    count = len(listed) if listed is not None else min(shard.nsamples, report.filesize // BLOCK)
    if count < shard.nsamples:
        report.add("index", f"the tar cannot hold {shard.nsamples} samples", shard)
    lines, damage = _Lines(listed, count), []
    good, sound, bad = _check_samples(task, tar, lines, damage, report)
    _check_structure(shard, lines, damage, report)
    _check_file(shard, tar.sha256(), report)

    known_good = not shard.sha256 or report.sha256 == shard.sha256
    checked = (task.labels is not None or task.crc32 is not None) and (listed is not None or not damage)
    if not known_good and not checked:
        report.notes.append(f"{shard.url}: no checksum confirms its labels: --repair leaves out all its samples")
        bad += [number for number, *_ in sound]
        good, sound = [], []
    report.damaged = bool(bad or damage or not report.nsamples)
    report.bad = tuple(sorted(bad))
    report.sound = np.array(sound, SOUND)
    if task.repair:
        report.idx = format_idx(good)


def _check_samples(
    task: ShardToCheck, tar: _HashedTar, lines: _Lines, damage: list[TarError], report: ShardReport
) -> tuple[list[tuple[Member, ...]], list[tuple], list[int]]:
    """Check each sample of the tar. The members of the sound ones, their rows of SOUND, the numbers of the bad ones.

    Places where the tar is damaged are appended to `damage`.
    """
    split, shard = task.split, task.shard
    rule = LabelRule(split.label_member.lower(), split.label_key, split.classes, len(split.classes) or 1 << 31)
    good, sound, bad = [], [], []
    left_out, order = set(shard.bad), -1
    for number, sample in enumerate(samples(tar.read, report.filesize, damage=damage)):
        report.nsamples = number + 1
        if number in left_out:
            bad.append(number)
            continue
        order += 1
        key = sample_key(sample)
        line = lines.find(sample, order, bool(damage))
        try:
            if difference := lines.difference(sample, line):
                if damage:
                    raise BadSample(difference, "tar")
                report.add("index", difference, shard, number, key)
            if line >= 0:
                lines.met[line] = True
            label, crc32 = _check_sample(task, tar, sample, line, rule)
        except BadSample as error:
            report.add(error.kind, str(error), shard, number, key)
            bad.append(number)
            continue
        good.append(sample)
        digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        sound.append((number, label, crc32, int.from_bytes(digest, "little")))
    return good, sound, bad


def _check_sample(
    task: ShardToCheck, tar: _HashedTar, sample: tuple[Member, ...], line: int, rule: LabelRule
) -> tuple[int, int]:
    """Label and CRC-32 of a sample. `line`: its place in the index, -1: none. Raises BadSample if it is damaged."""
    split = task.split
    crc32, image_data, label_data = 0, b"", b""
    image, label_from = check_members(sample, rule, split.encoding)
    for member in sample:
        if member.size > _MAX_MEMBER:
            raise BadSample(f".{member.ext} has {member.size:,} bytes, more than an image of a data set has", "image")
        data = tar.read(member.offset, member.size)
        crc32 = zlib.crc32(data, crc32)
        if member is image:
            image_data = data
        if member is label_from:
            label_data = data
    if task.crc32 is not None and line >= 0 and crc32 != task.crc32[line]:
        raise BadSample(f"its bytes have changed: CRC-32 {crc32:08x}, not {task.crc32[line]:08x}", "checksum")
    label = read_label(label_data, rule)
    if task.labels is not None and line >= 0 and label != task.labels[line]:
        raise BadSample(f"the tar says label {label}, {split.labels} says {task.labels[line]}")
    if task.decode:
        check_image(image_data, split)
    return label, crc32


def _check_structure(shard: Shard, lines: _Lines, damage: list[TarError], report: ShardReport) -> None:
    """The tar as a whole: damaged places, and samples that only the index has."""
    wrong = [error.verdict for error in damage]
    if not report.nsamples and not damage:
        wrong.append("it holds no samples")
    if shard.repaired:
        report.notes += [f"{shard.url}: known damage: {what}" for what in wrong]
        wrong = []
    if not report.nsamples and len(lines.met):
        wrong.append(f"the index has {len(lines.met):,} samples, the tar none")
    for what in wrong:
        report.add("tar", what, shard)
    for line, key in lines.not_met() if report.nsamples else ():
        report.add("tar", "the index has it, the tar does not", shard, line, key)


def _check_file(shard: Shard, sha256: str, report: ShardReport) -> None:
    """Size and digest of the tar."""
    report.sha256 = sha256
    if shard.filesize and report.filesize != shard.filesize:
        report.add("checksum", f"the tar has {report.filesize} bytes, the index says {shard.filesize}", shard)
    elif shard.sha256 and sha256 != shard.sha256:
        where = "" if report.problems else "; no sample is harmed as far as the index can tell"
        report.add("checksum", f"the tar's sha256 is not the one in the index{where}", shard)
