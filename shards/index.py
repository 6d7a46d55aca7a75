"""Indexes tar shards that others made: `.idx` beside each tar, `<split>.json` and the labels of each split.

In: a folder of WebDataset tars, or their URLs. Out: what `shards.pack` would have written beside them. Only headers
and labels are read. `python -m shards.index --help` says how splits, images and labels are found.
"""

import argparse
import os
import time

from shards.command import Parser, run
from shards.errors import InputError, few, short
from shards.format.names import chosen_tars, not_read
from shards.machine.cores import cores_given
from shards.machine.files import is_remote

_EPILOG = """\
which split a tar belongs to:
  The split is named by a word train, val, valid, validation or test in the name of the tar (train-000000.tar,
  imagenet-train-0001.tar, train-0000-of-0128.tar), else in that of its folder, one level deep (train/0000.tar);
  otherwise by the name without its number, or by the folder. --splits NAME=PATTERN overrides this: a glob below
  DEST, or a path or URL with a range of numbers, {000000..000127}. Shards are ordered by name, numbers as numbers.
samples:
  A sample is a series of members with the same name up to the first dot. Its image is the first .jpg .jpeg .png
  .webp (any case), .raw or .yuv; its label is the decimal text of .cls, or a field of .json (--label-key). Other
  members are ignored. A label that is not a number is looked up in --classes.
"""


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
    p.add_argument("--classes", metavar="FILE", help="names of the classes, one per line, that of label 0 first")
    p.add_argument("--skip-bad", action="store_true", help="leave out what is damaged or lacks image or label")
    p.add_argument("--workers", type=int, default=cores_given().count, metavar="N", help="processes (all cores)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Index all splits of DEST."""
    args = parser().parse_args(argv)
    if args.workers < 1:
        raise InputError(f"--workers {args.workers}: at least 1")
    out = _folder_for_index(args.dest, args.out)
    from shards.check.indexing import IndexOptions, index_splits, read_classes

    classes = read_classes(args.classes) if args.classes else ()
    started = time.monotonic()
    tars, others = chosen_tars(args.dest, args.splits), not_read(args.dest)
    if not tars:
        hint = f"; unpack {short(others[0])} to .tar first: compressed tars cannot be read at random" if others else ""
        raise InputError(f"no .tar in {args.dest} or one folder below{hint}")
    options = IndexOptions(args.dest, out, args.label_member, args.label_key, classes, args.skip_bad, args.workers)
    try:
        index_splits(options, tars)
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}") from None
    if others and not args.splits:
        print(f"note: not read, for the name does not end in .tar: {few(others, 4, ', ')}")
    print(f"indexed in {time.monotonic() - started:.1f} s")
    return 0


def _folder_for_index(dest: str, out: str | None) -> str:
    """The folder to write the index to: `out`, else `dest`. Raises InputError if that cannot be written."""
    if not is_remote(dest) and not os.path.isdir(dest):
        raise InputError(f"no folder {dest}")
    if out is not None:
        try:
            os.makedirs(out, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make --out {out}: {error.strerror}") from None
        return out
    advice = "give --out DIR for the index, then --data DIR to train"
    if is_remote(dest):
        raise InputError(f"{dest} cannot be written to: {advice}")
    if not os.access(dest, os.W_OK):
        raise InputError(f"no permission to write into {dest}: {advice}")
    return dest


if __name__ == "__main__":
    run(main)
