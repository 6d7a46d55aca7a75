"""Packs images into shuffled WebDataset shards: `python -m shards.pack SOURCE DEST`, or the same under mpirun.

In: class folders, IDX files, ILSVRC archives or shards. Out: DEST/<split>-000000.tar with .idx, <split>.json and
mean.npy: the same bytes for the same seed, whatever the number of processes. The same command resumes after a stop.
"""

import argparse
from typing import TYPE_CHECKING

from shards.command import Parser, run
from shards.errors import InputError

if TYPE_CHECKING:
    from shards.write.shard import Options

DESCRIPTION = """\
Pack images into shuffled WebDataset shards, in parallel. SOURCE is one of
  a folder with train/CLASS/* and val/CLASS/* (also Train, training_set, valid, test, ...), or CLASS/* only;
    images without class folders need --labels, except in Tiny ImageNet and Kaggle's copy of ImageNet
  a folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, or one of the tars
  a folder with IDX files, as for MNIST (train-images-idx3-ubyte.gz, t10k-images-idx3-ubyte.gz and labels)
  a folder of WebDataset shards (<split>-000000.tar)
Archives are read in place. The same command, given again after a stop, carries on."""


def parser() -> Parser:
    """Options of the command."""
    p = Parser(prog="python -m shards.pack", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("source", metavar="SOURCE")
    p.add_argument("dest", metavar="DEST", help="folder for the shards")
    p.add_argument("--resize", type=int, metavar="N", help="pixels (default 256); 0 keeps sizes")
    p.add_argument(
        "--fit",
        choices=("crop", "squash", "none"),
        help="crop: centre square, N x N (default); squash: N x N;\nnone: shorter side N",
    )
    p.add_argument(
        "--encoding",
        choices=("jpeg", "raw", "planes", "copy"),
        default="jpeg",
        help="jpeg (default); raw: pixels, read by plain copying;\n"
        "planes: a JPEG's luma and chroma, half of raw;\ncopy: files unchanged",
    )
    p.add_argument("--quality", type=int, metavar="Q", help="of jpeg and planes, 1 to 100 (default 90)")
    p.add_argument("--split", default="", metavar="NAME", help="name of the only split, or pack only this one")
    p.add_argument("--labels", default="", metavar="FILE", help="devkit, or a table (.csv, .txt): image, class")
    p.add_argument("--shard-mb", type=float, metavar="MB", help="size of a shard, about (default 64)")
    p.add_argument("--shard-images", type=int, metavar="N", help="the same as a number of images")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default 0)")
    p.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores that this job may use)")
    p.add_argument(
        "--max-bad",
        type=int,
        default=0,
        metavar="N",
        help="leave out up to N images that cannot be decoded;\nmore are an error (default 0)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Pack SOURCE into DEST; the exit code."""
    arguments = parser().parse_args(argv)
    options = checked_options(arguments)
    from shards.write.pool import mpi_world, serve_rank

    comm = mpi_world(arguments.workers is not None)
    if comm is not None and comm.rank > 0:
        packings = comm.bcast(None)
        if packings is not None:  # else rank 0 found nothing to do, or an error, and said so
            serve_rank(comm, packings)
        return 0
    from shards.write.pack import pack

    names = ("source", "dest", "split", "labels", "workers", "max_bad")
    return pack(options, comm, **{name: getattr(arguments, name) for name in names})


def checked_options(arguments: argparse.Namespace) -> "Options":
    """The options that decide the bytes of the shards. Raises InputError for those that do not go together."""
    from shards.write.shard import Options

    given = {name: getattr(arguments, name) for name in ("resize", "fit", "quality")}
    given = {name: value for name, value in given.items() if value is not None}
    layout = {name: getattr(arguments, name) for name in ("seed", "shard_mb", "shard_images")}
    if arguments.encoding == "copy":
        if given:
            raise InputError(f"--encoding copy leaves the files as they are: leave --{next(iter(given))} out")
        given = {"resize": 0, "fit": "none", "quality": 0}
    if arguments.encoding == "raw":
        if "quality" in given:
            raise InputError("--quality is for --encoding jpeg and planes")
        given["quality"] = 0
    options = Options(**given, encoding=arguments.encoding, **layout)
    if not (options.resize == 0 or 8 <= options.resize <= 4096):
        raise InputError(f"--resize {options.resize}: give 8 to 4096 pixels, or 0 to keep sizes")
    if options.encoding in ("raw", "planes") and options.fit == "none" and options.resize:
        raise InputError(
            f"{options.encoding} images must have one size: --fit crop or squash, or --resize 0 where they have "
            "it already"
        )
    if options.encoding in ("jpeg", "planes") and not 1 <= options.quality <= 100:
        raise InputError(f"--quality {options.quality}: give 1 to 100")
    for name, least in (("workers", 1), ("shard_images", 1), ("shard_mb", 0.001), ("max_bad", 0), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    if arguments.seed >= 1 << 63:
        raise InputError(f"--seed {arguments.seed}: give less than 2^63")
    if arguments.shard_mb is not None and arguments.shard_images is not None:
        raise InputError("give one of --shard-mb and --shard-images")
    return options


if __name__ == "__main__":
    run(main)
