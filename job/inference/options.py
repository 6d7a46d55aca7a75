"""Options that the commands for a trained network share."""

import argparse

WHICH = "best, newest, or a file of the run [best: best.pt, or the newest where nothing was validated]"


def add_network(parser: argparse.ArgumentParser) -> None:
    """RUN_OR_CHECKPOINT and --checkpoint: as `run` and `checkpoint`, for job.run.checkpoint.load_named."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="run directory, or a checkpoint file")
    add_checkpoint(parser)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """--checkpoint alone."""
    parser.add_argument("--checkpoint", default="best", metavar="WHICH", help=f"of a run directory: {WHICH}")
