"""The page of a training run: what it learned from, how it learned, what it knows and what it confuses.

In: a run directory, its checkpoint, its data. Out: `Content`. What cannot be shown is left out and named.
"""

import argparse
import os
from dataclasses import dataclass, field

import numpy as np

from job import config
from job.batches.data import match_classes
from job.batches.device import to_device
from job.batches.loader import Loader
from job.inference.outcomes import Outcomes
from job.inference.record import Run, load_run
from job.inference.scores import centre_input, scores_of
from job.inference.trained import TrainedNetwork, load_network, use_given_cores
from job.look import answers
from job.look.augmented import first_crops
from job.look.content import Content, Gallery, Section, Tile
from job.look.curves import curves
from job.look.pictures import filters, photograph
from job.network.precision import set_precision
from shards.errors import InputError
from shards.format.split import Split, load_split
from shards.machine.progress import Progress
from shards.read.samples import Samples

LIMIT = 5000  # validation images on a CPU
CROPS = 23  # augmented images on the page, which the mean image makes full rows with
BATCH = 64
SYNTHETIC = "synthetic"


@dataclass
class Found:
    """What there is to look at; None: it is missing, and `notes` says why."""

    run: Run
    network: TrainedNetwork | None = None
    train: Split | None = None
    val: Split | None = None
    notes: list[str] = field(default_factory=list)


def look(options: argparse.Namespace) -> Content:
    """The page of a run. Raises InputError for wrong options; what is missing in the run itself becomes a note."""
    use_given_cores()
    found = find(options)
    sections = [learning(found), *augmented(found), *first_layer(found)]
    table, bad = look_at(found, options.limit) if found.network and found.val else (None, 0)
    if table is not None and len(table):
        samples = Samples(found.val)
        sections += answers.sections(table, samples, found.network.classes, found.network.image_size)
    looked = 0 if table is None else len(table)
    if bad:
        found.notes.append(f"{bad:,} images of {found.val.root} cannot be decoded, and were left out")
    name = os.path.basename(found.run.path)
    summary = f"{name}: {looked:,} images looked at" if looked else name
    if found.network:
        summary += f", checkpoint {found.network.path}"
    return Content(f"Run {name}", facts(found, looked), [s for s in sections if s], found.notes, summary)


def find(options: argparse.Namespace) -> Found:
    """Open run, checkpoint and data."""
    try:
        run = load_run(options.source)
    except InputError as error:
        if not os.path.exists(os.path.join(options.source, "config.yaml")):
            raise
        run = Run(os.path.abspath(options.source), config.read_flat(f"{options.source}/config.yaml"), [], {})
        found = Found(run, notes=[f"no learning curves: {error}"])
    else:
        found = Found(run)
    try:
        found.network = load_network(options.source, options.checkpoint, options.device)
    except InputError as error:
        if options.checkpoint != "best" or options.device == "cuda":
            raise
        found.notes.append(f"nothing that needs the network: {error}")
    data = options.data or run.settings.get("data", "")
    if data in (SYNTHETIC, ""):
        why = (
            "was trained on noise (--data synthetic)" if data else "has no config.yaml that names its data; give --data"
        )
        found.notes.append(f"no images: the run {why}")
        return found
    for split in ("train", "val"):
        try:
            setattr(found, split, load_split(data, split))
        except InputError as error:
            if options.data and not found.train:
                raise
            found.notes.append(f"no {'training' if split == 'train' else 'validation'} images: {error}")
    return found


def facts(found: Found, looked: int) -> list[tuple[str, str]]:
    """The head of the page."""
    run, network = found.run, found.network
    get = run.settings.get
    rows = [("run directory", run.path), ("recipe", str(get("recipe", "not known")))]
    if network:
        best = ", the newest: nothing was validated"
        if network.best_top1 is not None:
            best = f", best top-1 in validation so far {network.best_top1:.2%}"
        rows.append(("checkpoint", f"{network.path}, step {network.step:,}{best}"))
        weights = sum(p.numel() for p in network.parameters())
        size = network.image_size
        rows.append(("network", f"{size}x{size} pixels -> {len(network.classes):,} classes, {weights:,} weights"))
    trained = f"global batch {get('global-batch')}, seed {get('seed')}, {get('precision')}" if run.settings else ""
    status = run.summary.get("status") or "no summary.json: not finished"
    rows.append(("training", f"{trained}; {status}"))
    if found.train or found.val:
        rows.append(("data", (found.train or found.val).root))
    if looked:
        of = found.val.nsamples
        every = "all" if looked == of else "evenly spaced"
        rows.append(("images looked at", f"{looked:,} of the {of:,} of val, {every}"))
    return rows


def learning(found: Found) -> Section | None:
    """Learning curves."""
    made = curves(found.run)
    return Section("How it learned", figures=made) if made else None


def augmented(found: Found) -> list[Section]:
    """Training images as the network gets them."""
    if not (found.train and found.run.settings):
        return []
    settings = config.from_flat(found.run.settings)
    try:
        crops = first_crops(found.train, settings, CROPS)
    except InputError as error:
        found.notes.append(f"no augmented images: {error}")
        return []
    names = found.train.classes
    tiles = []
    for crop in crops:
        name = names[crop.label] if names else str(crop.label)
        tiles.append(Tile(photograph(crop.image, f"a training image of the class {name}"), [name, crop.place]))
    if found.network:
        mean = found.network.mean.permute(1, 2, 0).cpu().numpy().round().clip(0, 255).astype(np.uint8)
        tiles.append(Tile(photograph(mean, "the mean image"), ["(mean image)"]))
    size, batch = settings.image_size, settings.global_batch
    what = f"all {batch:,}" if len(crops) == batch else f"the first {len(crops)} of {batch:,}"
    text = (
        f"The first step of this run: {what} images over all ranks, cropped to {size}x{size} pixels and mirrored as "
        "the network got them; below each, row and column of its corner in the stored image. The mean image is "
        "subtracted from what the network sees; here it is added back."
    )
    return [Section("What the network gets", [text], galleries=[Gallery(tiles)])]


def first_layer(found: Found) -> list[Section]:
    """The filters of conv1."""
    if not found.network:
        return []
    weight = found.network.network.conv1.weight.detach().float().cpu().numpy()  # (F, 3, K, K)
    count, _, side, _ = weight.shape
    columns = next((n for n in (16, 12, 8, 6, 4) if count % (2 * n) == 0), 8)
    grouped = found.network.network.conv2.groups == 2
    halves = (
        f" Filters 1 to {count // 2} feed the first column of the network, the others the second: conv2 has two groups."
        if grouped
        else ""
    )
    text = (
        f"The {count} filters of conv1, {side}x{side} pixels each, in colour: what the first layer looks for. Each is "
        f"scaled by itself, and grey is zero.{halves} Smooth edges and blobs of colour are the sign of a trained "
        "layer, and noise that of one that needs more epochs, more images or another learning rate."
    )
    picture = filters(weight, columns, f"{count} filters of conv1 in a grid of {columns} columns")
    return [Section("What the first layer looks for", [text], wide=picture)]


def look_at(found: Found, limit: int | None) -> tuple[np.ndarray | None, int]:
    """Rows of `job.inference.outcomes.ROW` of up to `limit` validation images, and the number of unreadable ones.

    Every n-th image of the split is taken, with the smallest n that `limit` allows. 0: all; None: all on a GPU, and
    LIMIT on a CPU.
    """
    network, split = found.network, found.val
    device = network.mean.device
    if limit is None:
        limit = 0 if device.type == "cuda" else LIMIT
    every = -(-split.nsamples // limit) if limit else 1
    outcomes = Outcomes()
    try:
        relabel = match_classes(split, found_classes(network), len(network.classes), network.path)
        relabel = None if relabel is None else relabel.to(device)
        set_precision(network.precision)
        with Loader(
            split,
            rank=0,
            world_size=every,
            global_batch=BATCH * every,
            crop=network.image_size,
            train=False,
            workers=0,
            max_bad_fraction=1.0,
            pin=device.type == "cuda",
        ) as loader:
            shown = Progress(-(-split.nsamples // every), what="looking")
            try:
                for batch, images, labels in to_device(loader, device, centre_input(network.mean, device)):
                    labels = labels if relabel is None else relabel[labels]
                    scores = scores_of(network.network, images, network.precision)
                    outcomes.add(loader.validation_samples(batch.step), scores, labels)
                    shown.add(len(labels))
            finally:
                shown.close()
            table = outcomes.table()
            return table[~np.isin(table["sample"], list(loader.bad_samples))], len(loader.bad_samples)
    except InputError as error:
        found.notes.append(f"no answers of the network: {error}")
        return None, 0


def found_classes(network: TrainedNetwork) -> list[str]:
    """Names of the network's classes; empty where they are only numbers."""
    numbers = [str(label) for label in range(len(network.classes))]
    return [] if network.classes == numbers else network.classes
