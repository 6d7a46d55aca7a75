"""The report of `shards.verify`, as one JSON object and as text.

In: the reports of the splits, and what a repair wrote. Out: plain lists and dictionaries, or lines on stdout.
"""

import dataclasses

from shards.check.samples import Problem
from shards.check.split import SplitReport
from shards.format.split import Split

_SHOWN = 20  # problems in the text


def summary(found: list[SplitReport], others: list[Problem], repaired: dict[str, Split]) -> dict:
    """The report as --json prints it. `others`: problems of no split; `repaired`: the new indexes by split."""
    problems, splits, notes = [], {}, []
    for report in found:
        split, new = report.split, repaired.get(report.split.name)
        splits[split.name] = {
            "shards": len(split.shards),
            "samples": split.nsamples,
            "bytes": sum(shard.filesize for shard in report.shards),
            "classes": len(split.classes),
            "problems": report.count,
            "repaired": new is not None,
            "samples_left": new.nsamples if new else split.nsamples,
        }
        notes += report.notes + [note for shard in report.shards for note in shard.notes]
        problems += [{"split": split.name, **dataclasses.asdict(problem)} for problem in report.all_problems()]
    problems += [{"split": "", **dataclasses.asdict(problem)} for problem in others]
    left = len(others) + sum(report.count for report in found if report.split.name not in repaired)
    size = sum(split["bytes"] for split in splits.values())
    seconds = sum(report.seconds for report in found)
    retries = sum(shard.retries for report in found for shard in report.shards)
    if retries:
        notes.append(f"{retries} dropped connections were resumed")
    return {
        "ok": left == 0,
        "splits": splits,
        "problem_count": sum(report.count for report in found) + len(others),
        "problems": problems,
        "notes": notes,
        "bytes": size,
        "seconds": round(seconds, 3),
        "mb_per_second": round(size / 1e6 / max(seconds, 1e-9), 1),
    }


def print_report(report: dict) -> None:
    """Print what `summary` returned."""
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
