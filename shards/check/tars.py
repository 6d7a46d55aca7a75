"""Reads one tar that is to be indexed: its samples, their labels, and what is wrong with it.

In: a tar, where the label of a sample is, and which samples are already known to be bad. Out: `TarContents`, and an
.idx beside the tar. Of image members only the headers are read.
"""

import dataclasses

import numpy as np

from shards.check.samples import BadSample, LabelRule, Problem, check_members, encoding_of, read_label, sample_key
from shards.errors import InputError
from shards.format.split import BARE, Member, format_idx
from shards.format.tar import NotTar, TarError, open_tar, samples, window_read
from shards.machine.files import is_remote, write_whole

_REMOTE_WINDOW = 4 << 20  # bytes per request: many small requests cost more than the data between the headers


@dataclasses.dataclass(frozen=True)
class TarToIndex:
    """A tar and what is known of it before it is read."""

    path: str
    url: str  # as <split>.json will name it
    idx: str  # path of the .idx to write
    rule: LabelRule
    known_bad: tuple[int, ...]  # samples that an earlier `shards.verify --repair` left out of this very file
    known_damage: bool
    skip_bad: bool


@dataclasses.dataclass
class TarContents:
    """What a tar holds."""

    filesize: int = 0
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))  # of the samples to use
    bad: tuple[int, ...] = ()  # samples left out, numbered as in the tar
    problems: list[Problem] = dataclasses.field(default_factory=list)
    damaged: bool = False  # there are samples or bytes that cannot be used
    encodings: set[str] = dataclasses.field(default_factory=set)
    bare_sizes: set[int] = dataclasses.field(default_factory=set)  # bytes of the images that are bare pixels
    not_tar: bool = False  # the file is of another kind


def index_tar(task: TarToIndex) -> TarContents:
    """Read one tar. Write its .idx unless something is wrong that is not to be skipped.

    Raises:
        InputError: the file cannot be read.
    """
    found = TarContents()
    good: list[tuple[Member, ...]] = []
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
                if encoding in BARE:
                    found.bare_sizes.add(image.size)
    except OSError as error:
        raise InputError(f"cannot read {task.path}: {error.strerror or error}", everywhere=False) from None
    found.not_tar = any(isinstance(error, NotTar) for error in damage)
    if not task.known_damage and (wrong := _whole_tar(damage, good, found.problems)):
        found.problems.insert(0, Problem("tar", wrong, task.url))  # first: it explains the others
    found.labels, found.bad = np.array(labels, np.int32), tuple(bad)
    found.damaged = bool(bad or damage or not good)
    if not found.problems or (task.skip_bad and not found.not_tar):
        write_whole(task.idx, format_idx(good))
    return found


def _whole_tar(damage: list[TarError], good: list, bad: list[Problem]) -> str:
    """What is wrong with the tar itself, in one line. `good`: its samples; `bad`: the problems of the others."""
    words = [damage[0].verdict] if damage else []
    if len(damage) > 1:
        words.append(f"{len(damage) - 1} further places are damaged")
    if not good and len(bad) != 1 and not (damage and damage[0].offset == 0):
        none = f"none of its {len(bad):,} samples can be used (the first: {bad[0].message})" if bad else ""
        words.append(none or "it holds no samples")
    return "; ".join(words)
