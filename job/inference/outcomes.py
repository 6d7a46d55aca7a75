"""What a network made of each sample of a split, and of each class, as tables and CSV files.

In: scores and labels, batch by batch. Out: one row per sample (`ROW`), summed up per class and per confused pair.
"""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.read.samples import Samples, shard_keys

ROW = np.dtype(
    [
        ("sample", np.int64),  # number in the split
        ("label", np.int32),  # as the network numbers its classes
        ("predicted", np.int32),
        ("probability", np.float32),  # of the predicted class
        ("label_probability", np.float32),
        ("top1", np.bool_),
        ("top5", np.bool_),
    ]
)


class Outcomes:
    """Collects a row per sample of this process."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, samples: np.ndarray, scores: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            samples: int64 (n,), numbers in the split.
            scores: float32 (n, classes).
            labels: int64 (n,), on the device of the scores.
        """
        five = scores.topk(min(5, scores.shape[1]), dim=1).indices  # (n, 5)
        probabilities = torch.softmax(scores, dim=1)
        hits = five == labels[:, None]
        rows = np.empty(len(samples), ROW)
        rows["sample"] = samples
        for name, column in (
            ("label", labels),
            ("predicted", five[:, 0]),
            ("probability", probabilities.gather(1, five[:, :1])[:, 0]),
            ("label_probability", probabilities.gather(1, labels[:, None])[:, 0]),
            ("top1", hits[:, 0]),
            ("top5", hits.any(dim=1)),
        ):
            rows[name] = column.cpu().numpy()
        self._rows.append(rows)

    def table(self) -> np.ndarray:
        """All rows, `ROW` (n,), in the order of the split."""
        rows = np.concatenate([np.empty(0, ROW), *self._rows])
        return rows[np.argsort(rows["sample"], kind="stable")]


def join(tables: Sequence[np.ndarray]) -> np.ndarray:
    """The tables of several ranks as one, in the order of the split."""
    rows = np.concatenate(tables)
    return rows[np.argsort(rows["sample"], kind="stable")]


def class_name(classes: Sequence[str], label: int) -> str:
    """Name of a class; its number where the names are not known."""
    return classes[label] if label < len(classes) else str(label)


def confused(table: np.ndarray, classes: int) -> list[tuple[int, int, int]]:
    """(label, predicted, count) of all pairs that were confused, the most frequent first."""
    wrong = table[~table["top1"]]
    pairs, counts = np.unique(wrong["label"].astype(np.int64) * classes + wrong["predicted"], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(pairs[i] // classes), int(pairs[i] % classes), int(counts[i])) for i in order]


def per_class(table: np.ndarray, classes: Sequence[str], outputs: int) -> list[dict[str, Any]]:
    """A record per class of the network: samples, top1, top5 (fractions; None without samples), most confused with.

    Args:
        classes: names, as far as they are known.
        outputs: number of classes.
    """
    counts, right, five = (
        np.bincount(table["label"], weights=weights, minlength=outputs)
        for weights in (None, table["top1"], table["top5"])
    )
    worst: dict[int, tuple[int, int]] = {}
    for label, predicted, count in confused(table, outputs):
        worst.setdefault(label, (predicted, count))
    records = []
    for label in range(outputs):
        n = int(counts[label])
        other, times = worst.get(label, (None, 0))
        records.append(
            {
                "label": label,
                "class": class_name(classes, label),
                "samples": n,
                "top1": right[label] / n if n else None,
                "top5": five[label] / n if n else None,
                "confused_with": "" if other is None else class_name(classes, other),
                "confused_samples": times,
            }
        )
    return records


def csv_bytes(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def per_class_csv(table: np.ndarray, classes: Sequence[str], outputs: int) -> bytes:
    """`per_class` as a CSV file: label, class, samples, top1, top5, confused_with, confused_samples."""
    records = per_class(table, classes, outputs)
    rounded = [{k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()} for record in records]
    return csv_bytes(list(records[0]), [list(record.values()) for record in rounded])


def per_sample_csv(table: np.ndarray, samples: Samples, classes: Sequence[str], bad: dict[int, str]) -> bytes:
    """A line per sample in the order of the split, with its shard and its key there.

    Args:
        bad: number -> reason of the samples that could not be used. Their lines have no prediction: what the table
            says of them is of the samples that replaced them.
    """
    rows, split, known = [], samples.split, {}
    for row in table:
        number = int(row["sample"])
        shard, inside = samples.place(number)
        if shard not in known:
            known = {shard: shard_keys(split, shard)}  # one after the other: in the order of the split
        start = [number, split.shards[shard].url, known[shard][inside]]
        if number in bad:
            rows.append([*start, "", "", "", "", "", "", "", "", bad[number]])
            continue
        label, predicted = int(row["label"]), int(row["predicted"])
        rows.append(
            [*start, label, class_name(classes, label), predicted, class_name(classes, predicted)]
            + [f"{row['probability']:.6g}", f"{row['label_probability']:.6g}", int(row["top1"]), int(row["top5"]), ""]
        )
    columns = "sample shard key label class predicted_label predicted probability label_probability top1 top5 problem"
    return csv_bytes(columns.split(), rows)
