"""Measure one part of the job alone: `python -m job.bench loader [--json]`.

In: what to measure, and its options. Out: a few lines, or with --json one object that holds at least
images_per_second, device and versions.
"""

import argparse
import importlib
import json

from shards.command import Parser, run

# Subject -> the module that measures it. Each has DESCRIPTION, add_options(parser), measure(arguments) -> dict and
# text(result) -> str, and imports slow modules in `measure`, so that --help does not wait for them.
SUBJECTS = {
    "loader": "job.bench.loader",
    "compute": "job.bench.step",
    "allreduce": "job.bench.allreduce",
    "train": "job.bench.step",
}
# Subjects that ranks measure together, under horovodrun; rank 0 has the result.
OF_RANKS = ("compute", "allreduce", "train")


def parser() -> Parser:
    """The command line."""
    p = Parser(prog="python -m job.bench", description="Measure one part of the job alone.")
    subjects = p.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    for name, module in SUBJECTS.items():
        subject = importlib.import_module(module)
        options = subjects.add_parser(
            name,
            help=subject.DESCRIPTION.partition(".")[0],
            description=subject.DESCRIPTION,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        subject.add_options(options)
        options.add_argument("--json", action="store_true", help="print one JSON object")
    return p


def main() -> None:
    """The command."""
    arguments = parser().parse_args()
    subject = importlib.import_module(SUBJECTS[arguments.subject])

    def measure() -> None:
        result = subject.measure(arguments)
        if result is not None:
            print(json.dumps(result) if arguments.json else subject.text(result), flush=True)

    if arguments.subject in OF_RANKS:
        from job.ranks.process import run_ranks

        run_ranks(measure)
    measure()


if __name__ == "__main__":
    run(main)
