"""A page of pictures of a run or of a folder of shards: `python -m job.look RUN|DATA --out FILE.html`.

In: a run directory, which is only read, with its data; or a folder of shards. Out: one HTML file with its pictures
inside. One process, on one device.
"""

import argparse
import os
import sys

from job.inference.options import add_checkpoint
from shards.command import Parser, run
from shards.errors import InputError
from shards.machine.files import check_writable, is_remote, write_whole

DESCRIPTION = """\
Show what a network gets, learned and confuses, on one HTML page: augmented training images, learning curves, the
filters of conv1, accuracy of each class, confused pairs, most and least certain images. Of a folder of shards: what is
in its splits."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises InputError."""
    parser = Parser(prog="python -m job.look", description=DESCRIPTION)
    parser.add_argument("source", metavar="RUN|DATA", help="run directory of job.train, or folder of shards")
    parser.add_argument("--out", required=True, metavar="FILE.html", help="page to write")
    parser.add_argument("--data", metavar="DIR", help="of a run: folder of shards [as in its config.yaml]")
    add_checkpoint(parser)
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="of a run: look at up to N images of val, evenly spaced; 0: at all [all on a GPU, 5000 on a CPU]",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 0:
        raise InputError("--limit must be 0 or more")
    return options


def main() -> None:
    """The command."""
    options = parse()
    check_writable(options.out)
    from job.look import page

    if is_run(options.source):
        from job.look.of_run import look
    else:
        from job.look.of_data import look
    content = look(options)
    data = page.render(content)
    try:
        write_whole(options.out, data)
    except OSError as error:
        raise InputError(f"cannot write {options.out}: {os.strerror(error.errno or 0)}") from None
    for note in content.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{content.summary} -> {options.out}, {len(data) / 1e6:.1f} MB")


def is_run(source: str) -> bool:
    """Whether a path is a run directory; otherwise it is taken for data. Raises InputError if it is not there."""
    if is_remote(source):
        return False
    if os.path.isfile(source):
        raise InputError(
            f"{source} is a file; give the run directory (--checkpoint {os.path.basename(source)} chooses the "
            "checkpoint), or a folder of shards"
        )
    if not os.path.isdir(source):
        raise InputError(f"no folder {source}; give a run directory of job.train, or a folder of shards")
    return any(os.path.exists(os.path.join(source, name)) for name in ("metrics.jsonl", "config.yaml"))


if __name__ == "__main__":
    run(main)
