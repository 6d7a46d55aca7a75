"""The page of a folder of shards: its splits, classes, sizes, mean image, samples, and the crops of training.

In: a folder or URL of shards. Out: `Content`. Of the images, only those that are shown are decoded.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from job import config
from job.batches.device import load_mean
from job.look.augmented import first_crops
from job.look.content import MOST_BARS, Content, Gallery, Section, Table, Tile
from job.look.pictures import Picture, figure, photograph
from shards.errors import InputError, few
from shards.format.names import natural
from shards.machine.files import is_remote
from shards.read.images import BadImage, header_size
from shards.read.inputs import split_names
from shards.read.reader import DamagedSample
from shards.read.samples import Samples

SAMPLES, CROPS = 24, 16  # images of a split, and crops, on the page
SIZES = 1000  # images whose headers are read where sizes differ
FEWEST = 5  # classes that are named at either end of the balance
ORDER = ("train", "val", "test")  # splits that come first


def look(options: argparse.Namespace) -> Content:
    """The page of the shards. Raises InputError if there are none, or an index is damaged."""
    if options.data:
        raise InputError(f"--data is for a run directory; {options.source} is none, for it has no metrics.jsonl")
    notes: list[str] = []
    splits = [Samples(split) for split in open_splits(options.source)]
    sections = [overview(splits), balance(splits), *sizes(splits), *mean_image(splits, notes)]
    for samples in splits:
        sections.append(examples(samples, notes))
    sections += crops(splits, notes)
    images = sum(map(len, splits))
    facts = [
        ("folder", options.source),
        ("images", f"{images:,} in {len(splits)} split{'s' * (len(splits) > 1)}"),
        (
            "classes",
            f"{len(splits[0].classes):,}: {few(splits[0].classes, 8, ', ')}" if splits[0].classes else "unnamed",
        ),
    ]
    for samples in splits:
        samples.close()
    return Content("What is in these shards", facts, sections, notes, f"{options.source}: {images:,} images")


def open_splits(source: str) -> list:
    """All splits of a folder; of a server, which lists no files, train and val. Raises InputError."""
    from shards.format.split import load_split

    names = list(ORDER[:2]) if is_remote(source) else split_names(source)
    if not names:
        raise InputError(
            f"{source} is neither a run directory of job.train nor a folder of shards with an index; "
            "python -m shards.index makes one"
        )
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), natural(name)))
    return [load_split(source, name) for name in names]


def overview(splits: Sequence[Samples]) -> Section:
    """A row per split."""
    rows = []
    for samples in splits:
        split = samples.split
        size = f"{split.width}x{split.height}" if split.width else "differ"
        gigabytes = sum(shard.filesize for shard in split.shards) / 1e9
        stored = f"{gigabytes:,.2f} GB" if gigabytes >= 0.1 else f"{gigabytes * 1e3:,.1f} MB"
        left_out = sum(len(shard.bad) for shard in split.shards)
        rows.append(
            [split.name, f"{len(samples):,}", f"{len(split.shards):,}", stored if gigabytes else "not recorded", size]
            + [
                {"raw": "raw pixels", "planes": "luma and chroma"}.get(split.encoding, "image files"),
                f"{left_out:,}",
            ]
        )
    columns = ["split", "images", "shards", "size", "pixels", "stored as", "left out as damaged"]
    return Section("Splits", tables=[Table(columns, rows)])


def balance(splits: Sequence[Samples]) -> Section:
    """How many images each class has."""
    classes = max(len(samples.classes) or int(samples.labels.max()) + 1 for samples in splits)
    counts = {samples.split.name: np.bincount(samples.labels, minlength=classes) for samples in splits}
    first = next(iter(counts.values()))
    largest, smallest = int(first.max()), int(first.min())
    text = [
        f"{next(iter(counts))}: from {smallest:,} to {largest:,} images per class, median {np.median(first):,.0f}."
        + (" All classes have the same number." if largest == smallest else "")
    ]
    empty = [splits[0].name(label) for label in np.flatnonzero(first == 0)]
    if empty:
        text.append(f"{len(empty):,} classes have no images: {few(empty, 6, ', ')}.")
    if classes <= MOST_BARS:
        rows = []
        for label in range(classes):
            cells = [(f"{count[label]:,}", count[label] / max(1, count.max())) for count in counts.values()]
            rows.append([splits[0].name(label) if label < len(splits[0].classes) else str(label), *cells])
        table = Table(["class", *counts], rows, bars=range(1, 1 + len(counts)))
        return Section("Classes", text, tables=[table])
    order = np.argsort(-first, kind="stable")
    chosen = [*order[:FEWEST], *order[-FEWEST:]]
    rows = [[splits[0].name(int(label)), *(f"{count[label]:,}" for count in counts.values())] for label in chosen]
    table = Table(["class", *counts], rows, title=f"The {FEWEST} largest and the {FEWEST} smallest classes")
    return Section("Classes", text, figures=[_sorted_counts(counts)], tables=[table])


def _sorted_counts(counts: dict[str, np.ndarray]) -> tuple[Picture, str]:
    text = "Images of each class, the largest class first."

    def paint(axes, colours: Sequence[str]) -> None:
        for (name, count), colour in zip(counts.items(), colours, strict=False):
            axes.plot(np.arange(1, len(count) + 1), np.sort(count)[::-1], color=colour, label=name)
        axes.set_xlabel("class, by size")
        axes.set_ylabel("images")
        axes.set_ylim(0, None)
        axes.legend()

    return figure(paint, text), text


def sizes(splits: Sequence[Samples]) -> list[Section]:
    """Widths and heights, where they differ."""
    samples = next((samples for samples in splits if not samples.split.width), None)
    if samples is None:
        return []
    chosen = np.unique(np.linspace(0, len(samples) - 1, SIZES).astype(int))
    found = [size for number in chosen if (size := _size(samples, int(number)))]
    if not found:
        return []
    height, width = np.array(found).T
    short = np.minimum(height, width)
    text = (
        f"Images of {samples.split.name} differ in size. Of {len(found):,}, evenly spaced, the shorter side has "
        f"{short.min():,} to {short.max():,} pixels, half of them more than {np.median(short):,.0f}. Readers scale "
        "it in training; shards.pack --resize does so once."
    )

    def paint(axes, colours: Sequence[str]) -> None:
        axes.plot(width, height, ".", color=colours[0], markersize=3, alpha=0.6)
        axes.set_xlabel("width, pixels")
        axes.set_ylabel("height, pixels")
        axes.set_xlim(0, None)
        axes.set_ylim(0, None)

    caption = "Width and height of these images, a dot each."
    return [Section("Sizes", [text], figures=[(figure(paint, caption), caption)])]


def _size(samples: Samples, number: int) -> tuple[int, int] | None:
    try:
        return header_size(samples.data(number))
    except (BadImage, DamagedSample):
        return None


def mean_image(splits: Sequence[Samples], notes: list[str]) -> list[Section]:
    """The mean image that training subtracts."""
    split = next((samples.split for samples in splits if samples.split.mean), None)
    if split is None:
        return []
    try:
        mean = load_mean(split).numpy()  # (H, W, 3)
    except InputError as error:
        notes.append(f"no mean image: {error}")
        return []
    red, green, blue = mean.mean(axis=(0, 1))
    text = (
        f"Training subtracts it from every image. On average red {red:.1f}, green {green:.1f}, blue {blue:.1f} of 255."
    )
    if mean.shape[:2] == (1, 1):
        return [Section("Mean colour", [text])]
    shown = photograph(mean.round().clip(0, 255).astype(np.uint8), "the mean image")
    tile = Tile(shown, ["mean image", f"{mean.shape[1]}x{mean.shape[0]} pixels"])
    return [Section("Mean image", [text], galleries=[Gallery([tile])])]


def examples(samples: Samples, notes: list[str]) -> Section:
    """Images of a split, evenly spaced over its classes."""
    order = np.argsort(samples.labels, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, SAMPLES).round().astype(int))]
    tiles = []
    for number in chosen.tolist():
        try:
            sample = samples[number]
        except BadImage as error:
            notes.append(f"left out: {error}")
            continue
        height, width = sample.image.shape[:2]
        picture = photograph(small(sample.image), f"an image of the class {sample.name}")
        tiles.append(Tile(picture, [sample.name, f"{sample.key}, {width}x{height}"]))
    text = f"{len(tiles)} of the {len(samples):,} images, evenly spaced over the classes, with key and size."
    return Section(f"Images of {samples.split.name}", [text], galleries=[Gallery(tiles)])


def small(image: np.ndarray, most: int = 256) -> np.ndarray:
    """The image, scaled down to a shorter side of `most` pixels where it is larger."""
    from shards.read.images import fit_image

    return fit_image(image, most, "none") if min(image.shape[:2]) > most else image


def crops(splits: Sequence[Samples], notes: list[str]) -> list[Section]:
    """Random crops, as training with default settings would make them."""
    split = next((samples.split for samples in splits if samples.split.name == "train"), None)
    if split is None:
        return []
    settings = config.Config()
    side = min(split.height, split.width)
    if side and side < settings.image_size:
        settings.image_size = max(1, round(side * settings.image_size / 256))
    try:
        made = first_crops(split, settings, CROPS)
    except InputError as error:
        notes.append(f"no crops: {error}")
        return []
    tiles = []
    for crop in made:
        name = split.classes[crop.label] if split.classes else str(crop.label)
        tiles.append(Tile(photograph(crop.image, f"a crop of an image of the class {name}"), [name, crop.place]))
    size = settings.image_size
    text = (
        f"The first images of a run with seed {settings.seed}: crops of {size}x{size} pixels, half of them "
        "mirrored; below each, row and column of its corner in the stored image."
    )
    return [Section("Crops for training", [text], galleries=[Gallery(tiles)])]
