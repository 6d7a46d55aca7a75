"""The data of a run: its splits for training and validation, whether they fit the settings, and this rank's loaders.

In: the settings, a rank's place among the ranks. Out: `Data`, which all ranks compare, and loaders of batches.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence

import torch

from job.batches import synthetic
from job.batches.device import load_mean
from job.batches.loader import Loader
from job.config import Config
from shards.errors import InputError
from shards.format.split import Split, load_labels, load_split


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a run; `val` is None where nothing is validated."""

    train: Split
    val: Split | None
    classes: int  # of the network


def open_data(config: Config, world_size: int) -> tuple[Data, dict[str, str]]:
    """The run's data; and what must be the same on all ranks, name -> text, for `job.ranks.agree`.

    Raises:
        InputError: no such shards, or they do not fit the settings.
    """
    if config.data == synthetic.NAME:
        train, val, facts = synthetic.synthetic_split(config.model.classes), None, {}
    else:
        train = load_split(config.data, "train")
        val = load_split(config.data, "val") if config.eval_every else None
        facts = split_facts(train, val)
    check_data(config, train, val, world_size)
    classes = config.model.classes or len(train.classes)
    return Data(train, val, classes), facts | {"classes": str(classes)}


def split_facts(*splits: Split | None, mean: bool = True) -> dict[str, str]:
    """What must be the same of the splits that each rank has opened, name -> text; `mean`: their mean images, too."""
    return {
        f"split {split.name}": f"{split.nsamples:,} samples in {len(split.shards)} shards, "
        f"contents {_digest(split, mean)}"
        for split in splits
        if split is not None
    }


def _digest(split: Split, mean: bool) -> str:
    """A short hash of the index (with the sha256 of the shards, if it has them) and, with `mean`, of the mean image.

    It does not depend on the folder: each node may have a copy of its own.
    """
    shards = [dataclasses.replace(shard, url=os.path.basename(shard.url), idx="") for shard in split.shards]
    digest = hashlib.sha256(repr(dataclasses.replace(split, root="", shards=tuple(shards))).encode())
    image = load_mean(split) if mean else None
    digest.update(b"" if image is None else image.numpy().tobytes())
    return digest.hexdigest()[:12]


def check_data(config: Config, train: Split, val: Split | None, world_size: int) -> None:
    """Raise InputError when settings and shards do not fit together."""
    if config.global_batch % world_size:
        below = config.global_batch // world_size * world_size
        fitting = f"{below} or {below + world_size}" if below else f"{world_size}"
        raise InputError(
            f"--global-batch {config.global_batch} cannot be divided among {world_size} ranks; use {fitting}"
        )
    if config.model.batch_norm and config.global_batch < 2 * world_size:
        raise InputError(
            f"--global-batch {config.global_batch} is one image per rank; batch normalisation needs two or more"
        )
    named = len(train.classes)
    if not named and not config.model.classes:
        raise InputError(f"{config.data} names no classes; give their number with --model.classes")
    if config.model.classes and config.model.classes < named:
        raise InputError(f"--model.classes is {config.model.classes}, but {config.data} has {named} classes")
    if val and named and val.classes and val.classes != train.classes:
        raise InputError(f"the splits train and val of {config.data} do not have the same classes; pack them together")
    classes = config.model.classes or named
    for split in filter(None, (train, val)):
        match_size(split, config.image_size)
        if not split.classes and (largest := int(load_labels(split).max())) >= classes:
            raise InputError(f"{split.name} of {split.root} has the label {largest}, but there are {classes} classes")
    if config.parallel == "hybrid" and classes < world_size:
        raise InputError(
            f"--parallel hybrid splits the {classes} classes among {world_size} ranks: one of them would have none; "
            f"use at most {classes} ranks, or --parallel gradients"
        )


def match_size(split: Split, crop: int, trained: Sequence[int] = (0, 0)) -> str:
    """A warning where the images of `split` are stored at another size than `trained` (height, width; 0: not known).

    Raises:
        InputError: they are smaller than the crops of `crop` pixels.
    """
    height, width = split.height, split.width
    if not (height and width):
        return ""
    stored = f"the {split.name} images of {split.root} are {width}x{height}"
    if min(height, width) < crop:
        raise InputError(f"{stored}, too small for crops of {crop}x{crop} (--image-size); pack larger ones")
    if all(trained) and (height, width) != tuple(trained):
        return (
            f"{stored}, and those that the network learns from {trained[1]}x{trained[0]}: a centre crop shows another "
            "part of them, and accuracy suffers; pack both with the same --resize"
        )
    return ""


def match_classes(split: Split, known: Sequence[str], classes: int, path: str) -> torch.Tensor | None:
    """The network's label for each label of `split`, int64, or None where they are the same.

    Args:
        known: names of the network's classes; empty: not known.
        classes: outputs of the network.

    Raises:
        InputError: the split has a class that the network does not know, or more classes than it.
    """
    names, known = list(split.classes), list(known)
    where = f"{split.name} of {split.root}"
    if names and known and names != known:
        unknown = next((name for name in names if known.count(name) != 1), None)
        if unknown is not None:
            raise InputError(
                f"{where} has the class {unknown!r}, which is not one of the {len(known)} of {path}; give shards with "
                "the names of classes that it was trained on, or correct `classes` in the index"
            )
        return torch.tensor([known.index(name) for name in names])
    largest = len(names) or int(load_labels(split).max()) + 1
    if largest > classes:
        raise InputError(f"{where} has {largest} classes, the network of {path} has {classes}")
    return None


def make_loaders(
    config: Config, data: Data, rank: int, world_size: int, start_step: int, pin: bool
) -> tuple[Loader | synthetic.SyntheticLoader, Loader | None]:
    """This rank's loaders for training, from `start_step` on, and for validation; their readers start at once.

    Args:
        pin: put batches into pinned memory, for copies to a GPU.
    """
    ranks = dict(rank=rank, world_size=world_size, global_batch=config.global_batch, crop=config.image_size, pin=pin)
    if config.data == synthetic.NAME:
        return synthetic.SyntheticLoader(data.train, **ranks, start_step=start_step), None
    readers = dict(
        workers=None if config.workers < 0 else config.workers, max_bad_fraction=config.stream.max_bad_fraction
    )
    loader = Loader(
        data.train,
        **ranks,
        **readers,
        seed=config.seed,
        start_step=start_step,
        mirror=config.stream.mirror,
        random_crop=config.stream.random_crop,
        window=config.stream.window,
        streams=config.stream.streams,
    )
    return loader, Loader(data.val, **ranks, **readers, train=False) if data.val else None
