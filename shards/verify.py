"""Verifies shards: reads every byte, decodes every image, and compares all with what the index says.

In: a folder or URL of indexed shards. Out: a report that names each damaged shard and sample; exit code 2 if there is
one. With --repair, a new index without the damaged samples; the tars are never written to.
"""

import json
import os

from shards.command import Parser, run
from shards.errors import EXIT_BAD_INPUT, InputError
from shards.machine.cores import cores_given
from shards.machine.files import is_remote


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
    """Verify the splits of DEST; 2 if anything is wrong that --repair did not fix."""
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
    from shards.check.repair import repair_split
    from shards.check.report import print_report, summary
    from shards.check.split import check_split, files_of_no_split, find_splits

    splits = find_splits(args.dest, args.split)
    found = [check_split(split, args.workers, not args.no_decode, args.repair) for split in splits]
    others = [] if args.split or is_remote(args.dest) else files_of_no_split(args.dest, splits)
    repaired = {}
    for report in found if args.repair else ():
        try:
            new = repair_split(report)
        except OSError as error:
            raise InputError(f"--repair cannot write into {args.dest}: {error.strerror or error}") from None
        if new:
            repaired[new.name] = new
    report = summary(found, others, repaired)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0 if report["ok"] else EXIT_BAD_INPUT


if __name__ == "__main__":
    run(main)
