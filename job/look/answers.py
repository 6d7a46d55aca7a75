"""What a network answers: accuracy of each class, confused pairs, images of which it is most and least certain.

In: rows of job.inference.outcomes, and the samples they are of. Out: sections of a page.
"""

from collections.abc import Sequence

import numpy as np

from job.inference.outcomes import class_name, confused, per_class
from job.inference.trained import crop_centre
from job.look.content import MOST_BARS, MOST_CELLS, Gallery, Matrix, Section, Table, Tile, caption
from job.look.pictures import figure, photograph
from shards.read.images import BadImage
from shards.read.samples import Samples

PAIRS, EXAMPLES = 10, 4  # confused pairs, and images of each
CERTAIN = 8  # images of each kind: right or wrong, most or least certain


class Answers:
    """The table with its samples, classes, and the size of the network's crop."""

    def __init__(self, table: np.ndarray, samples: Samples, classes: Sequence[str], size: int):
        self.table, self.samples, self.classes, self.size = table, samples, classes, size

    def tile(self, row: np.void, in_pair: bool) -> Tile:
        """The centre crop of an image, its class, and what it was taken for (`in_pair`: the title says both)."""
        name, guess = (class_name(self.classes, int(row[key])) for key in ("label", "predicted"))
        image = self.samples.image(int(row["sample"]))
        if min(image.shape[:2]) >= self.size:
            image = crop_centre(image, self.size)
        sure = f"{row['probability']:.0%} sure"
        answer = sure if row["top1"] else f"taken for {guess}, {sure}"
        lines = ["", sure] if in_pair else [name, answer]
        return Tile(photograph(np.ascontiguousarray(image), f"{name}, {answer}"), lines)

    def tiles(self, rows: np.ndarray, in_pair: bool = False) -> list[Tile]:
        """Tiles of rows whose image can be read."""
        made = []
        for row in rows:
            try:
                made.append(self.tile(row, in_pair))
            except BadImage:
                continue
        return made


def sections(table: np.ndarray, samples: Samples, classes: Sequence[str], size: int) -> list[Section]:
    """All sections about the network's answers."""
    about = Answers(table, samples, classes, size)
    return [accuracy(about), *confusions(about), certainty(about)]


def accuracy(about: Answers) -> Section:
    """Accuracy as a whole and per class."""
    table, outputs = about.table, len(about.classes)
    records = [record for record in per_class(table, about.classes, outputs) if record["samples"]]
    top1, top5 = table["top1"].mean(), table["top5"].mean()
    text = [f"Of {len(table):,} validation images, {top1:.2%} are right at the first guess, {top5:.2%} within five."]
    ordered = sorted(records, key=lambda record: -record["top1"])
    figures, tables = [], []
    if len(records) <= MOST_BARS:
        tables.append(_class_table(ordered, ""))
    else:
        half = MOST_BARS // 2
        tables.append(_class_table(ordered[:half], f"The {half} classes with the highest accuracy"))
        tables.append(_class_table(ordered[-half:][::-1], f"The {half} classes with the lowest accuracy"))
        figures.append(_spread([record["top1"] for record in records]))
        text.append("python -m job.evaluate --per-class FILE.csv writes all classes into a table.")
    matrix = None
    if outputs <= MOST_CELLS:
        cells = np.zeros((outputs, outputs), int)
        np.add.at(cells, (table["label"], table["predicted"]), 1)
        matrix = Matrix(about.classes, cells.tolist())
    return Section("What it gets right", text, figures=figures, tables=tables, matrix=matrix)


def _class_table(records: Sequence[dict], title: str) -> Table:
    rows = []
    for record in records:
        other = f"{record['confused_with']} ({record['confused_samples']:,})" if record["confused_samples"] else ""
        top1, top5 = record["top1"], record["top5"]
        rows.append([record["class"], (f"{top1:.1%}", top1), f"{top5:.1%}", f"{record['samples']:,}", other])
    return Table(["class", "top-1", "top-5", "images", "most often taken for"], rows, bars=[1], title=title)


def _spread(values: Sequence[float]) -> tuple:
    text = f"Number of classes by top-1 accuracy; half of the classes are above {np.median(values):.1%}."

    def paint(axes, colours) -> None:
        axes.hist(values, bins=np.linspace(0, 1, 21), color=colours[0], rwidth=0.9)
        axes.set_xlabel("top-1")
        axes.set_ylabel("classes")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")

    return figure(paint, text), text


def confusions(about: Answers) -> list[Section]:
    """The most confused pairs, with examples."""
    pairs = confused(about.table, len(about.classes))[:PAIRS]
    if not pairs:
        return [Section("What it confuses", ["Nothing: every image that was looked at is right at the first guess."])]
    table, galleries = about.table, []
    for label, guess, count in pairs:
        name, other = (class_name(about.classes, number) for number in (label, guess))
        of = int((table["label"] == label).sum())
        examples = table[(table["label"] == label) & (table["predicted"] == guess)][:EXAMPLES]
        title = f"{caption(name)}, taken for {caption(other)}"
        galleries.append(
            Gallery(about.tiles(examples, in_pair=True), title, f"{count:,} images, {count / of:.1%} of the class")
        )
    text = "The pairs of classes that are confused most often, and the first images of each in the order of the shards."
    return [Section("What it confuses", [text], galleries=galleries, pairs=True)]


def certainty(about: Answers) -> Section:
    """The images of which the network is most and least certain, right and wrong ones."""
    galleries = []
    for right, words in ((True, "right"), (False, "wrong")):
        rows = about.table[about.table["top1"] == right]
        rows = rows[np.argsort(-rows["probability"], kind="stable")]
        few = min(CERTAIN, -(-len(rows) // 2))  # each image once
        for most, chosen in ((True, rows[:few]), (False, rows[len(rows) - min(few, len(rows) // 2) :][::-1])):
            if len(chosen):
                title = f"{'Most' if most else 'Least'} certain, and {words}"
                why = "Wrong labels are often found here." if most and not right else ""
                galleries.append(Gallery(about.tiles(chosen), title, why))
    text = "How sure the network is: the probability that it gives to the class that it takes for the most likely."
    return Section("What it is sure of", [text], galleries=galleries)
