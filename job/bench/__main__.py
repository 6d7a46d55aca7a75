"""Measure one part of the job alone: `python -m job.bench loader [--json]`.

In: what to measure, and its options. Out: a few lines, or with --json one object that holds at least
images_per_second, device and versions.
"""

import argparse
import importlib
import json

from job.bench.options import SUBJECTS
from shards.command import Parser, run


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m job.bench", description="Measure one part of the job alone.")
    subjects = p.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    for name, subject in SUBJECTS.items():
        options = subjects.add_parser(
            name,
            help=subject.description.partition(".")[0],
            description=subject.description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        subject.add_options(options)
        options.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    if SUBJECTS[arguments.subject].of_ranks:
        from job.ranks.process import run_ranks  # now, so that --help does not wait for it

        run_ranks(lambda: measure(arguments))
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure, and print the result on rank 0."""
    module = importlib.import_module(SUBJECTS[arguments.subject].module)
    result = module.measure(arguments)
    if result is not None:
        print(json.dumps(result) if arguments.json else module.text(result), flush=True)


if __name__ == "__main__":
    run(main)
