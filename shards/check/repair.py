"""Writes a new index that leaves out what is damaged. Tars are never written to.

In: the report of a split. Out: its .idx files, labels, CRC-32s and `<split>.json`, of the sound samples only.
"""

import dataclasses
import os

import numpy as np

from shards.check.shard import ShardReport
from shards.check.split import SplitReport
from shards.errors import InputError
from shards.format.split import Shard, Split, format_idx, parse_idx, save_index
from shards.machine.files import is_remote, write_whole


def repair_split(found: SplitReport) -> Split | None:
    """Write an index of the sound samples only; the new split. None: nothing had to be written.

    Raises:
        InputError: no sample is sound, or an .idx lies outside the split's folder.
        OSError: a file cannot be written.
    """
    split = found.split
    if not found.count and split.crc32 and all(shard.sha256 for shard in split.shards):
        return None
    kept = [
        (shard, _without(report, found.repeats.get(number)))
        for number, (shard, report) in enumerate(zip(split.shards, found.shards, strict=True))
        if not report.missing
    ]
    sound = np.concatenate([report.sound for _, report in kept]) if kept else ()
    if not len(sound):
        raise InputError(f"no sample of split {split.name!r} is sound; pack it again")
    paths = [_idx_to_write(split, shard) for shard, _ in kept]
    for path, (_, report) in zip(paths, kept, strict=True):
        write_whole(path, report.idx)
    shards = tuple(
        dataclasses.replace(
            shard,
            nsamples=len(report.sound),
            filesize=report.filesize,
            sha256=report.sha256,
            bad=report.bad,
            repaired=report.damaged,
        )
        for shard, report in kept
    )
    return save_index(dataclasses.replace(split, shards=shards), split.root, sound["label"], sound["crc32"])


def _without(report: ShardReport, positions: np.ndarray | None) -> ShardReport:
    """The report without some of its sound samples, which now count as bad."""
    if positions is None:
        return report
    gone = set(positions.tolist())
    lines = parse_idx(report.idx, "the new index")
    return dataclasses.replace(
        report,
        idx=format_idx([line for position, line in enumerate(lines) if position not in gone]),
        bad=tuple(sorted((*report.bad, *report.sound["number"][positions].tolist()))),
        sound=np.delete(report.sound, positions),
        damaged=True,
    )


def _idx_to_write(split: Split, shard: Shard) -> str:
    """Path of a shard's .idx. It must lie in the split's own folder: an index must not make us write elsewhere."""
    path = split.idx_path(shard)
    root = os.path.realpath(split.root)
    if is_remote(path) or os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise InputError(
            f"--repair does not write {path}, outside {split.root}: index into another folder first, "
            f"python -m shards.index {split.root} --out DIR, and repair that"
        )
    return path
